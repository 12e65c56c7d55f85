"""Neighborhood attention on images of small windows as fused kernels of one pass, differentiable in every array.

    z_ij = scale <q_i, k_j> + bias_n[j - i + w - 1]     for low(i) <= j < high(i) along both axes
    lse_i = log sum_j exp(z_ij)                         o_i = sum_j exp(z_ij - lse_i) v_j

    out, lse = one_pass_attention(query, key, value, bias, axes=(rows, columns), scale=0.2, platform="tpu")

What is kept for the backward pass is the arguments, the table of `tables` and lse. TPU only.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.derivatives import noted, once, was_noted, zeros_for_symbols
from pallas_kernels.entry import Platform, alike
from pallas_kernels.neighborhood import one_pass_tpu, tables
from pallas_kernels.neighborhood.tables import LANES, SUBLANES, Along, Bounds, Problem


class Operands(NamedTuple):
    """Arrays as the kernels read them: heads side by side, and for each axis where tiles begin and of what kind."""

    query: Array
    key: Array
    value: Array
    table: Array
    along_x: Array
    along_y: Array


def one_pass_attention(
    query: Float[Array, "B X Y N H"],
    key: Float[Array, "B Xk Yk N H"],
    value: Float[Array, "B Xk Yk N H"],
    bias: Float[Array, "N dx dy"] | None = None,
    *,
    axes: tuple[Bounds, Bounds],
    scale: float,
    platform: Platform,
) -> tuple[Float[Array, "B X Y N H"], Float[Array, "B X Y N"]]:
    """Outputs in the query's dtype and the log-sum-exp in float32, natural logarithm.

    Args:
      query, key, value: bfloat16 or float32, as many heads of each.
      bias: for every head and distance key - query along the axes, with the distance 0 in the middle.
      axes: the windows along X and Y among the keys, each of some groups; batch row b is of group b mod G, row-major
        over the groups of the axes. No window may be empty.
      platform: "tpu"; "interpret" runs its kernels step by step anywhere.

    Raises:
      NotImplementedError: what the kernels do not do, with the reason.
    """
    p = problem(query, key, value, axes=axes, biased=bias is not None, scale=scale, platform=platform)
    flat = (x.reshape(*x.shape[:3], -1) for x in (query, key, value))
    places = (jnp.asarray(_places(axis)) for axis in (p.x, p.y))
    out, lse = attend(p, Operands(*alike(*flat, tables.table(p, bias), *places)))
    return out.reshape(query.shape), tables.untiled(p, lse)


def problem(
    query: Any, key: Any, value: Any, *, axes: tuple[Bounds, Bounds], biased: bool, scale: float, platform: Platform
) -> Problem:  # fmt: skip
    """What a call is to the kernels; raises `NotImplementedError` with the reason where they do not do it."""
    if platform not in ("tpu", "interpret"):
        raise NotImplementedError("the kernels of one pass are of TPUs")
    batch, *_, heads, width = query.shape
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in (jnp.bfloat16, jnp.float32) or x.dtype != query.dtype:
            raise NotImplementedError(f"{name}: the kernel multiplies bfloat16 or float32 alone, not {x.dtype}")
        if (x.shape[0], *x.shape[3:]) != (batch, heads, width):
            raise NotImplementedError(f"{name}: in one pass all heads are alike, {query.shape}, not {x.shape}")
    if width > LANES or (heads * width > LANES and LANES % width):
        raise NotImplementedError(f"query: heads that fill {LANES} lanes are taken in one pass, not {heads} of {width}")
    fixed: Any = {"biased": biased, "scale": float(scale), "dtype": query.dtype, "interpret": platform == "interpret"}
    unfitted = Problem(batch, heads, width, axes, (1, SUBLANES), **fixed)
    found, grid = tables.choose(unfitted), unfitted.key_grid
    if found is None:
        raise NotImplementedError(f"an image of {grid} with such windows does not fit the chip in one pass")
    return found


def _places(axis: Along) -> np.ndarray:
    return np.stack([axis.start, axis.kind], axis=-1).reshape(-1).astype(np.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(p: Problem, operands: Operands) -> tuple[Array, Array]:
    return _run(p, operands)


@functools.partial(jax.jit, static_argnums=0)
def _run(p: Problem, operands: Operands) -> tuple[Array, Array]:
    return one_pass_tpu.forward(p, _to_base_2(operands))


def _to_base_2(operands: Operands) -> dict[str, Array]:
    return operands._asdict() | {"table": operands.table * one_pass_tpu.LOG2E}


def attend_forward(p: Problem, operands: Any) -> Any:
    with_table = noted(p.biased and operands.table.perturbed)
    operands = jax.tree.map(lambda x: x.value, operands)
    out, lse = once(functools.partial(_run, p), operands)
    return (out, lse), (operands, lse, with_table)


def attend_backward(p: Problem, residuals: Any, cotangents: tuple[Any, Any]) -> tuple[Operands]:
    return (once(functools.partial(_gradients, p), residuals, *zeros_for_symbols(cotangents)),)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(p: Problem, residuals: Any, d_out: Array, d_lse: Array) -> Operands:
    operands, lse, with_table = residuals
    given = _to_base_2(operands) | {"lse": lse, "out_gradient": d_out, "lse_gradient": d_lse}
    found = one_pass_tpu.backward(p, given, with_table=was_noted(with_table))
    gradients: dict[str, Any] = dict.fromkeys(Operands._fields)
    gradients |= {"query": found["dq"], "key": found["dk"], "value": found["dv"], "table": found.get("dtable")}
    return Operands(**gradients)


attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
