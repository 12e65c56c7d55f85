"""How fast are the linear kernels on this GPU, beside flash-linear-attention's, the XLA path and cuDNN's softmax?

python -m benchmarks linear_gpu --write

The peer takes part where it is installed, `pip install flash-linear-attention[cuda]`, on the same arrays.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import fla_peer
from benchmarks.measure import Result, interleaved, median, ratio, rms_ratio
from jattn import delta_rule, linear_attention

SIZES = ((8, 2048), (2, 8192), (1, 32768))
HEADS, WIDTH = 16, 128
REPEAT = 10
"""Calls in a row, waited for once: what it takes to launch one is hidden behind the one before."""
FORMS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "simple GLA": (linear_attention, ("scalar",)),
    "GLA": (linear_attention, ("channel",)),
    "gated delta rule": (delta_rule, ("beta", "scalar")),
    "KDA": (delta_rule, ("beta", "channel")),
}
WAYS = ("forward", "forward + backward")


def missing() -> str | None:
    """Why this machine cannot answer, if so."""
    # Else jax takes three quarters of the memory, and the peer has to do with the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return None if jax.default_backend() == "gpu" else f"a GPU is needed, jax sees {jax.default_backend()}"


def run(
    sizes: Sequence[tuple[int, int]] = SIZES,
    heads: int = HEADS,
    width: int = WIDTH,
    *,
    kernels: Any = None,
    softmax: Any = "cudnn",
    repeat: int = REPEAT,
) -> Result:
    """For every (batch, length); `kernels` is the implementation that is measured, by default the op's own choice."""
    no_peer, scale = fla_peer.missing(), width**-0.5
    rows: list[dict[str, Any]] = []
    targets: list[tuple[str, float, float, str]] = []
    for batch, length in sizes:
        x = _operands(batch, length, heads, width)
        cotangent = x.pop("cotangent")
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=softmax)
        softmax_ways = _compiled(attend, [x[name] for name in ("query", "key", "value")], cotangent)
        for form, (op, more) in FORMS.items():
            operands = {name: x[name] for name in ("query", "key", "value", *more)}
            ours, xla = (
                _compiled(
                    functools.partial(op, scale=scale, implementation=implementation), [*operands.values()], cotangent
                )
                for implementation in (kernels, "xla")
            )
            case, out = f"{form}, {batch} x {length}", np.asarray(ours["forward"]()[0], np.float32)
            ways = {"jattn": ours, "xla": xla, "softmax": softmax_ways}
            wait: dict[str, Callable[[Any], Any]] = dict.fromkeys(ways, jax.block_until_ready)
            want = np.asarray(xla["forward"]()[0], np.float32)
            if no_peer is None:
                peer = fla_peer.Peer(form, operands, cotangent, scale)
                ways["fla"], wait["fla"] = {WAYS[0]: peer.forward, WAYS[1]: peer.both}, peer.wait
                targets.append(
                    (f"{case}: outputs beside fla's, RMS ratio", rms_ratio(out, peer.outputs()), 1e-2, "at most")
                )
            targets.append((f"{case}: outputs beside the XLA path's, RMS ratio", rms_ratio(out, want), 1e-2, "at most"))
            for way in WAYS:
                calls = {name: _repeated(of[way], repeat, wait[name]) for name, of in ways.items()}
                seconds = interleaved(calls, rounds=7, warmup=2)
                others = {name: ratio(seconds, name, "jattn") for name in ways if name != "jattn"}
                tokens = 1e-6 * batch * length * repeat / median(seconds, "jattn")
                speed = {f"x {name}": others.get(name, "-") for name in ("fla", "xla", "softmax")}
                rows.append({"": case, "way": way, "million tokens/s": tokens, **speed})
                said = ", ".join(f"{name} {times:.2f}" for name, times in others.items())
                print(f"{case}, {way}: {tokens:.3g} million tokens/s, times {said}", file=sys.stderr, flush=True)
                if "fla" in others:
                    targets.append((f"{case}, {way}: speed over fla's", others["fla"], 1.0, "at least"))
    device = jax.devices()[0].device_kind
    title = f"Linear kernels on {device}: {heads} heads of {width}, bfloat16, as fast as others times"
    return Result(title, rows, targets, [no_peer or fla_peer.version(), f"softmax: causal, {softmax}"])


def _operands(batch: int, length: int, heads: int, width: int) -> dict[str, jax.Array]:
    """Keys of length 1; gates that forget to exp(-0.1) at most, as trained layers' do."""
    keys, tall = jax.random.split(jax.random.key(0), 7), (batch, length, heads)
    query, key, value, cotangent = (jax.random.normal(each, (*tall, width)) for each in keys[:4])
    key /= jnp.linalg.norm(key, axis=-1, keepdims=True)
    wide = {"query": query, "key": key, "value": value, "cotangent": cotangent}
    return {name: x.astype(jnp.bfloat16) for name, x in wide.items()} | {
        "scalar": -0.1 * jax.random.uniform(keys[4], tall),
        "channel": -0.1 * jax.random.uniform(keys[5], (*tall, width)),
        "beta": jax.random.uniform(keys[6], tall),
    }


def _compiled(
    op: Callable[..., Any], operands: Sequence[jax.Array], cotangent: jax.Array
) -> dict[str, Callable[[], Any]]:
    @jax.jit
    def forward(*operands: jax.Array) -> Any:
        return (op(*operands),)

    @jax.jit
    def both(cotangent: jax.Array, *operands: jax.Array) -> Any:
        out, transpose = jax.vjp(op, *operands)
        return transpose(cotangent.astype(out.dtype))

    return {WAYS[0]: lambda: forward(*operands), WAYS[1]: lambda: both(cotangent, *operands)}


def _repeated(call: Callable[[], Any], times: int, wait: Callable[[Any], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            last = call()
        wait(last)

    return run
