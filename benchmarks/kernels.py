"""Do the kernels that this device runs give what the readable references give? Values and all gradients.

python -m benchmarks kernels --write
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from benchmarks.measure import Result, rms_ratio
from jattn.masks import Causal, SlidingWindow

LENGTH, GRID = 1000, (30, 37)
LIMITS = {"bfloat16": (5e-3, 1e-2), "float32": (1e-5, 1e-5)}
"""RMS ratios of outputs and of the worst gradient, against float32."""


class Case(NamedTuple):
    """A call: arrays that get gradients, and what else the op takes."""

    op: Callable[..., Any]
    arrays: Mapping[str, jax.Array]
    options: Mapping[str, Any]


def missing() -> str | None:
    """Why this machine cannot answer, if so."""
    here = jax.default_backend()
    return None if here in ("gpu", "tpu") else f"kernels are for a GPU or a TPU, jax sees {here}"


def cases(length: int, grid: tuple[int, int], heads: int, width: int, dtype: Any) -> dict[str, Case]:
    """Lengths and grids of no whole blocks, query heads in groups, values of another width."""
    found: dict[str, Case] = {}
    segments = np.repeat([[1, 4, 5, 9]], [length // 3, 1, length // 2, length - length // 3 - 1 - length // 2], axis=1)
    packed = {"segment_ids": np.repeat(segments, 2, axis=0)}

    def normal(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape).astype(dtype)

    def tokens(kv_heads: int, value_width: int = width) -> dict[str, jax.Array]:
        key = normal(1, 2, length, kv_heads, width)
        key /= jnp.linalg.norm(key, axis=-1, keepdims=True)
        shapes = {"query": (2, length, heads, width), "value": (2, length, kv_heads, value_width)}
        return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items(), 2)} | {"key": key}

    def gates(strength: float, *shape: int) -> jax.Array:
        return -strength * jax.random.uniform(jax.random.key(4), shape)

    scalar, channel = (2, length, heads), (2, length, heads, width)
    decays = {
        "heads": gates(0.1, heads),
        "tokens": gates(0.2, *scalar),
        "channels": gates(0.2, *channel),
        "channels, strong": gates(3.0, *channel),
        "channels, stronger": gates(20.0, *channel),
    }
    beta = {"beta": jax.random.uniform(jax.random.key(5), scalar)}
    for name, gate in decays.items():
        for options in ({}, packed):
            also = ", packed" if options else ""
            given = tokens(heads, width // 2) | {"log_decay": gate}
            found[f"linear attention, decay of {name}{also}"] = Case(jattn.linear_attention, given, options)
            found[f"delta rule, decay of {name}{also}"] = Case(jattn.delta_rule, given | beta, options)
    grouped = tokens(heads // 2) | {"log_decay": gates(0.2, 2, length, heads // 2)}
    found["linear attention, heads in groups"] = Case(jattn.linear_attention, grouped, {})
    squared = {name: jnp.square(x) if name != "value" else x for name, x in tokens(heads).items()}
    found["linear attention, divided"] = Case(jattn.linear_attention, squared, {"normalize": True})
    softmax = {
        "causal": {"mask": Causal()},
        "packed, in a window": {"mask": Causal() & SlidingWindow(length // 5), **packed},
    }
    for name, options in softmax.items():
        found[f"softmax attention, {name}"] = Case(jattn.dot_product_attention, tokens(heads // 2), options)
    image = {name: normal(i, 2, *grid, heads, width) for i, name in enumerate(("query", "key", "value"))}
    for size in (7, 13):
        name = f"neighborhood attention, {size} x {size}"
        found[name] = Case(jattn.neighborhood_attention, image, {"kernel_size": size})
        bias = {"rel_pos_bias": normal(9, heads, 2 * size - 1, 2 * size - 1)}
        found[f"{name}, bias"] = Case(jattn.neighborhood_attention, image | bias, {"kernel_size": size})
    return found


def run(
    length: int = LENGTH,
    grid: tuple[int, int] = GRID,
    heads: int = 4,
    width: int = 64,
    *,
    kernels: Any = None,
    only: str = "*",
) -> Result:
    """`kernels` is the implementation that is compared, by default the op's own choice; `only` some cases, by name."""
    rows, targets = [], []
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    for dtype in LIMITS:
        for name, case in cases(length, grid, heads, width, dtype).items():
            if not fnmatch.fnmatch(name, only):
                continue
            (decision,) = jattn.explain(case.op, **case.arrays, **case.options, implementation=kernels)
            errors = _errors(case, kernels)
            out, worst = errors.pop("out"), max(errors, key=lambda name: errors[name])
            print(f"{name}, {dtype}: {out:.2g}, {errors[worst]:.2g}", file=sys.stderr, flush=True)
            rows.append(
                {
                    "": name,
                    "dtype": dtype,
                    "runs": decision.chosen[here],
                    "outputs": out,
                    "worst gradient": errors[worst],
                    "of": worst,
                }
            )
            for what, error, limit in zip(
                ("outputs", f"gradient of {worst}"), (out, errors[worst]), LIMITS[dtype], strict=True
            ):
                targets.append((f"{name}, {dtype}: {what}", error, limit, "at most"))
    title = f"Kernels on {jax.devices()[0].device_kind} against references in float32, RMS ratios"
    return Result(title, rows, targets)


def _errors(case: Case, kernels: Any) -> dict[str, float]:
    """Of outputs and of every gradient."""
    wide = {name: x.astype(jnp.float32) for name, x in case.arrays.items()}
    found = _both(case, case.arrays, kernels)
    with jax.default_matmul_precision("highest"):
        wanted = _both(case, wide, "reference")
    return {name: rms_ratio(x, wanted[name]) for name, x in found.items()}


def _both(case: Case, arrays: Mapping[str, jax.Array], implementation: Any) -> dict[str, jax.Array]:
    @jax.jit
    def run(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        out, transpose = jax.vjp(lambda x: case.op(**x, **case.options, implementation=implementation), arrays)
        cotangent = jax.random.normal(jax.random.key(8), out.shape, jnp.float32).astype(jnp.bfloat16).astype(out.dtype)
        return {"out": out} | transpose(cotangent)[0]

    return run(arrays)
