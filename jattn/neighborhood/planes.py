"""Neighborhoods with a bias in three dimensions, by the kernels of one pass: a plane of keys after the other.

Queries of plane t see keys of the planes t + e d, d the dilation, for the distances e that their windows hold along the
first axis. In each such pair of planes they attend as in an image, with the entries of the bias for that e, and

    out_t, lse_t = the merge of the attention over the planes t + e d          by log-sum-exp

Distances are walked over one by one, all planes of queries at a time: those of a window in the middle for all of them,
then those further away for the planes at the two ends alone, whose windows are moved inward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.dot_product import merge_attentions
from jattn.neighborhood import one_pass
from jattn.neighborhood.arguments import Operands
from jattn.neighborhood.window import Axis, Neighborhood, window_bounds
from pallas_kernels.block_sparse.attention import Platform


class Run(NamedTuple):
    """Planes of queries `first .. last - 1`, and the distances `least .. most` that some of them see."""

    first: int
    last: int
    least: int
    most: int


def runs(axis: Axis) -> list[Run]:
    """All that windows along an axis hold, without a stride and not causal."""
    before, after = axis.window // 2, axis.window - axis.window // 2 - 1
    extent, start, end = axis.extent, before * axis.dilation, after * axis.dilation
    found = [Run(0, extent, -before, after)]
    found += [Run(0, min(start, extent), after + 1, axis.window - 1)] if before else []
    found += [Run(max(0, extent - end), extent, 1 - axis.window, -before - 1)] if after else []
    return found


def pairs(axis: Axis) -> int:
    """How often queries of a plane attend to a plane."""
    return sum((run.last - run.first) * (run.most - run.least + 1) for run in runs(axis))


def plan(
    platform: Platform, x: Operands, neighborhood: Neighborhood, scale: float, q_tile: Any, kv_tile: Any
) -> one_pass.Plan:
    """Of a plane; raises `NotImplementedError` with the reason where the kernels do not do a call."""
    images = jax.eval_shape(_images, x)
    return one_pass.plan(platform, images, _inside(neighborhood, x.grid), scale, q_tile, kv_tile)


def _images(x: Operands) -> Operands:
    """Planes as batch rows, with the bias of one distance."""
    assert x.rel_pos_bias is not None
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), x._replace(rel_pos_bias=None))
    return rows._replace(rel_pos_bias=x.rel_pos_bias[:, 0])


def _inside(neighborhood: Neighborhood, grid: tuple[int, ...]) -> Neighborhood:
    """Of a plane."""
    _, windows, _, dilations, _ = zip(*neighborhood.axes(grid)[1:], strict=True)
    return Neighborhood(windows, dilation=dilations)


def attend(platform: Platform, x: Operands, neighborhood: Neighborhood, scale: float) -> tuple[Array, Array]:
    """`(out, lse)` of windows with a bias."""
    assert x.rel_pos_bias is not None
    axis = neighborhood.axes(x.grid)[0]
    outs, lses = [], []

    def within(image: Operands) -> tuple[Array, Array]:
        plan = one_pass.plan(platform, image, _inside(neighborhood, x.grid), scale, None, None)
        return one_pass.attend(plan, image)

    for run in runs(axis):
        out, lse = _attend_run(within, x, x.rel_pos_bias, axis, run)
        around = [(0, 0), (run.first, axis.extent - run.last), *[(0, 0)] * 3]
        outs.append(jnp.pad(out, [*around, (0, 0)]))
        lses.append(jnp.pad(lse, around, constant_values=-jnp.inf))
    return merge_attentions(outs, lses)


def _attend_run(
    within: Callable[[Operands], tuple[Array, Array]], x: Operands, bias: Array, axis: Axis, run: Run
) -> tuple[Array, Array]:  # fmt: skip
    """Of the queries of a run; `within` attends in planes."""
    batch, count = x.query.shape[0], run.last - run.first
    distances, t = np.arange(run.least, run.most + 1), np.arange(run.first, run.last)
    low, high = (bound[t] for bound in window_bounds(*axis))
    place = t // axis.dilation + distances[:, None]
    beyond = (axis.window - 1) * axis.dilation
    given = (
        jnp.asarray(beyond + run.first + distances * axis.dilation, jnp.int32),
        jnp.asarray((low <= place) & (place < high)),
        jnp.moveaxis(bias[:, run.least + axis.window - 1 : run.most + axis.window], 1, 0),
    )
    # Planes beyond the ends are seen by nobody.
    of_keys = {"key": x.key, "value": x.value} | ({} if x.key_mask is None else {"key_mask": x.key_mask})
    of_keys = {name: jnp.pad(a, [(0, 0), (beyond, beyond), *[(0, 0)] * (a.ndim - 2)]) for name, a in of_keys.items()}
    query = x.query[:, run.first : run.last]

    def rows(a: Array) -> Array:
        return a.reshape(-1, *a.shape[2:])

    def distance(_: None, given: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        start, seen, bias = given
        those = {name: rows(jax.lax.dynamic_slice_in_dim(a, start, count, axis=1)) for name, a in of_keys.items()}
        found = within(Operands(rows(query), **those, rel_pos_bias=bias))
        out, lse = (a.reshape(batch, count, *a.shape[1:]) for a in found)
        return None, (out, jnp.where(seen[:, None, None, None], lse, -jnp.inf))

    _, (outs, lses) = jax.lax.scan(distance, None, given)
    return merge_attentions([*outs], [*lses])
