"""Softmax attention over listed pairs of blocks as fused kernels, differentiable in every floating-point array.

    y_ts = scale <q_t, k_s> + bias_s     x_ts = f(y_ts)     z_ts = c tanh(x_ts / c)  with a soft cap c, else x_ts
    lse_t = log(sum_s exp(z_ts) + exp(sink))                o_t = sum_s exp(z_ts - lse_t) v_s

over the keys s that query t may attend to: their pair of blocks is listed, and in a partial block (kind 1) the element
rule holds, segments are equal and the key is in the query's window. A query that may attend to nothing gives 0 and
-inf (with a sink: 0 and the sink). A relative bias of `relative` is added to y too.

    out, lse = block_sparse_attention(q, k, v, by_row, by_col, element=mask.elem, scale=0.1, block_q=512, block_kv=1024)

What is kept for the backward pass is the arguments, the outputs and lse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse import (
    backward_gpu,
    backward_tpu,
    distances,
    distances_gpu,
    forward_gpu,
    forward_tpu,
    gpu,
    intervals,
    lists,
    relative,
    relative_gpu,
    scores,
    strips,
    tiling,
)
from pallas_kernels.block_sparse.intervals import Intervals
from pallas_kernels.block_sparse.limits import check, form, scalar_dtype
from pallas_kernels.block_sparse.marks import LEAST_SCALE, choose_marks, marked_keys
from pallas_kernels.block_sparse.relative import Alike, Codes, Relative
from pallas_kernels.block_sparse.strips import Strip
from pallas_kernels.block_sparse.tiling import LANES, Blocks, Tiling
from pallas_kernels.block_sparse.walk import Problem
from pallas_kernels.block_sparse.windows import Windows, check_windows, packed, whole_windows
from pallas_kernels.derivatives import noted, once, was_noted, zeros_for_symbols
from pallas_kernels.entry import GPU, Platform, alike


class Operands(NamedTuple):
    """Arrays as the kernels read them.

    On TPU heads stand side by side along the lanes, positions along the lanes, and lists are packed. On GPU queries,
    keys and values are as the op has them, `kv_bias [B, K, S]`, segments `[B, T]` and `[B, S]`.
    """

    query: Array
    key: Array
    value: Array
    kv_bias: Array | None
    sinks: Array | None
    seed: Array | None
    captured: tuple[Array, ...]
    q_segments: Array | None
    kv_segments: Array | None
    windows: Windows | None
    intervals: Intervals | None
    lines: Array | None
    sources: Array | None
    table: Array | None
    codes: Codes | None
    alike: Alike | None
    by_row: Any
    by_col: Any

    def named(self) -> dict[str, Array | None]:
        """What both walks read."""
        names = ("query", "key", "value", "kv_bias", "sinks", "seed", "q_segments", "kv_segments", "table", "sources")
        captured = {f"captured{i}": x for i, x in enumerate(self.captured)}
        masks = dict.fromkeys((*Windows._fields, *Intervals._fields, *Codes._fields))
        for found in (self.windows, self.intervals, self.codes):
            masks |= {} if found is None else found._asdict()
        return {**{name: getattr(self, name) for name in names}, **masks, **captured}


def block_sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    by_row: Any,
    by_col: Any = None,
    *,
    element: Callable[..., Any] | None = None,
    interval: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    captured: Sequence[Array] = (),
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    windows: Windows | None = None,
    rel_bias: Relative | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_bias: Float[Array, "B K S"] | None = None,
    scale: float,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Int[Array, ""] | None = None,
    block_q: int,
    block_kv: int,
    platform: Platform,
    cut: Tiling | Blocks | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Outputs in the query's dtype and the log-sum-exp in float32, natural logarithm.

    Args:
      query, key, value: bfloat16 or float32; query head n reads key head `n // (N // K)`.
      by_row: a `lists.WorkList` or what has its three arrays, concrete or traced, sorted by row; on GPU a
        `lists.BlockLists`.
      by_col: the same pairs sorted by col. Gradients need it, on TPU those of sequences that are too long for the chip.
      element: `element(q_pos, kv_pos, head) -> bool` on broadcast integers, asked in partial blocks only.
      interval: the same rule as `interval(q_pos) -> (low, high)` on NumPy integers, where the keys that each query
        sees are those from low to high - 1, or `None` where they are not. On TPU it takes less time.
      score_mod: f above, `score_mod(y, b, h, q_pos, kv_pos, *captured)`, on a tile of float32.
      captured: arrays that it reads by scalar indices, such as `slopes[h]`; by any, where all that it does is to add a
        number for every distance, such as `table[h, kv_pos - q_pos + c]`. They have gradients.
      q_segment_ids, kv_segment_ids: only equal ids attend to each other. A full block promises that they are equal.
      windows: `windows.Windows` of G groups: batch row b has those of b mod G, and may have lists of its group.
      rel_bias: a `relative.Relative` on the axes of `windows`, added to scaled scores; its table has a gradient. Lists
        and places are of NumPy then, on GPU lists those of all heads, and blocks are boxes of a grid.
      sinks: one logit for each query head that takes part in the softmax and has no value.
      dropout_rate, dropout_seed: probabilities are multiplied by `dropout.factors`, after lse was taken of all of them.
      block_q, block_kv: of the lists; multiples of 128, on GPU of 16.
      platform: "tpu" or "gpu"; "interpret" and "interpret_gpu" run their kernels step by step anywhere.
      cut: how a grid step, or on GPU a block, is cut up; `None` chooses.

    Raises:
      NotImplementedError: what the kernel does not do, with the reason.
      ValueError: lists or blocks that do not belong to the arrays, or do not fit scalar memory.
    """
    blocks = (block_q, block_kv)
    functions: Any = {"element": element, "score_mod": score_mod, "captured": captured}
    check(query, key, value, block_q=block_q, block_kv=block_kv, platform=platform, **functions)
    reads, adds, by_distance = form(score_mod, captured, lengths=(query.shape[1], key.shape[1]), platform=platform)
    (batch, q_len, heads, width), (kv_len, kv_heads, value_width) = query.shape, value.shape[1:]
    sizes = (q_len, kv_len, width, value_width, query.dtype)
    choose: Any = tiling.choose_blocks if platform in GPU else tiling.choose
    if cut is None:
        cut = choose(*sizes, block_q=block_q, block_kv=block_kv)
        if isinstance(cut, Blocks) and (rel_bias is not None or by_distance):
            cut = relative.fitted(cut, max(width, value_width), query.dtype)
    if (cut.block_q, cut.block_kv) != blocks:
        raise ValueError(f"cut: expected blocks of {block_q} x {block_kv}, got {cut.block_q} x {cut.block_kv}")
    if windows is not None:
        check_windows(windows, batch=batch, q_len=q_len, kv_len=kv_len)
    if rel_bias is not None:
        relative.check_relative(rel_bias, windows, heads=heads, q_len=q_len)
        if by_distance:
            raise NotImplementedError("score_mod: beside rel_bias the kernel adds no numbers for distances")
    groups = 1 if windows is None else windows.low.shape[0]
    for name, steps, which in (("by_row", by_row, 0), ("by_col", by_col, 1)):
        if steps is None:
            continue
        known: Any = {"rows_of_lists": {1, groups, batch}, "heads": heads, "kv_heads": kv_heads}
        if platform in GPU:
            lists.check_blocks(name, steps, **known, blocks=-(-(q_len, kv_len)[which] // blocks[which]))
        else:
            lists.check(name, steps, **known, lengths=(q_len, kv_len), blocks=blocks)
    if by_col is not None and by_col[0].shape[:2] != by_row[0].shape[:2]:
        raise ValueError(f"by_col: expected [Bm, Nm] as by_row has, {by_row[0].shape[:2]}, got {by_col[0].shape[:2]}")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids, kv_segment_ids: expected both or neither")
    fixed: Any = {
        "batch": batch,
        "q_len": q_len,
        "kv_len": kv_len,
        "heads": heads,
        "group": heads // kv_heads,
        "scale": scale,
        "soft_cap": soft_cap,
        "element": element,
        "score_mod": score_mod,
        "captured": tuple(x.shape for x in captured),
        "dropout_rate": dropout_rate,
        "dtype": query.dtype,
        "axes": 0 if windows is None else len(windows.place),
        "groups": groups,
    }
    operands = Operands(
        query=query,
        key=key,
        value=value,
        kv_bias=None if kv_bias is None else kv_bias.astype(jnp.float32),
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        seed=jax.lax.bitcast_convert_type(dropout_seed, jnp.int32)[None] if dropout_rate else None,  # type: ignore[arg-type]
        captured=() if by_distance else tuple(x.reshape(-1).astype(scalar_dtype(x)) for x in captured),
        q_segments=None if q_segment_ids is None else q_segment_ids.astype(jnp.int32),
        kv_segments=None if kv_segment_ids is None else kv_segment_ids.astype(jnp.int32),
        windows=None if windows is None else whole_windows(windows),
        intervals=None,
        lines=None,
        sources=None,
        table=None if rel_bias is None else rel_bias.table.astype(jnp.float32).reshape(heads, -1),
        codes=None,
        alike=None,
        by_row=by_row,
        by_col=by_col,
    )
    if isinstance(cut, Blocks):
        fixed |= {"list_rows": by_row.idx.shape[0], "layers": 0, "runs": 0, "distances": ()}
        if rel_bias is not None and windows is not None:
            found, fixed["layers"] = relative.alike(rel_bias, windows.place, by_row, blocks=blocks)
            operands = operands._replace(codes=relative.codes(rel_bias, windows.place), alike=found)
            fixed["distances"] = rel_bias.table.shape[1:]
        if score_mod is not None and by_distance:
            numbers = distances.numbers(score_mod, captured, np.arange(1 - q_len, kv_len), heads=heads)
            operands = operands._replace(table=numbers.astype(jnp.float32))
            fixed |= {"score_mod": None, "captured": (), "distances": numbers.shape[1:]}
        interpret = platform == "interpret_gpu"
        p: Any = gpu.Problem(width=width, value_width=value_width, blocks=cut, interpret=interpret, **fixed)
        if by_distance:
            p = dataclasses.replace(p, runs=distances_gpu.count(p, by_row))
        operands = operands._replace(by_row=lists.whole(by_row), by_col=None if by_col is None else lists.whole(by_col))
    else:
        marks = strip = None
        if score_mod is not None and by_distance:
            strip, firsts = distances.strip((q_len, kv_len), blocks)
            lines = distances.lines(score_mod, captured, strip, heads=heads, lengths=(q_len, kv_len))
            operands = _with_lines(operands, strip, lines)
            score_mod, fixed["score_mod"], fixed["captured"] = None, None, ()
        elif rel_bias is not None and windows is not None:
            strip, firsts = relative.strip(rel_bias, windows.place, by_row, blocks=blocks)
            operands = _with_lines(operands, strip, strips.lines(strip, rel_bias.table))
        penalties_last = score_mod is None and soft_cap is None and (scale > LEAST_SCALE or query.dtype == jnp.float32)
        if windows is not None and penalties_last:
            marks = choose_marks(windows.place, block_kv, width, may_widen=cut.split)
        guards = 0
        if windows is not None and marks is None:
            windows, guards = packed(windows)
            operands = operands._replace(windows=whole_windows(windows))
            fixed["axes"] = len(windows.place)
        operands, sides = _with_intervals(operands, element, interval, block_kv)
        if operands.intervals is not None:
            fixed["groups"] = operands.intervals.ends.shape[0]
        p = Problem(
            width=_whole(width if marks is None else marks.end),
            value_width=_whole(value_width),
            # Lanes beyond the values are there anyway; a tile of ones is added where it costs nothing. With dropout
            # what is multiplied by them is not what is summed up.
            sum_lane=value_width if (value_width % LANES or cut.ones) and not dropout_rate else None,
            sides=sides,
            adds=adds and soft_cap is None,
            reads=reads,
            tiling=cut,
            steps=by_row.row.shape[2],
            col_steps=by_col.row.shape[2] if by_col is not None else 0,
            list_rows=by_row.row.shape[0],
            list_heads=by_row.row.shape[1],
            marks=marks,
            guards=guards,
            strip=strip,
            interpret=platform == "interpret",
            **fixed,
        )
        operands = _laid_out(p, operands, [] if strip is None else strip.codes(*firsts))
    leaves, tree = jax.tree.flatten(operands)
    out, lse = attend(p, jax.tree.unflatten(tree, alike(*leaves)))
    out = out.reshape(batch, q_len, heads, p.value_width)[..., :value_width]
    return out, jnp.moveaxis(lse, 1, 2)


def _with_lines(x: Operands, strip: Strip, lines: Array) -> Operands:
    """And the numbers for distances."""
    sources = jnp.asarray(strips.sources(strip)) if strip.patterns > 1 else None
    return x._replace(table=None, lines=lines, sources=sources)


def _with_intervals(x: Operands, element: Any, interval: Any, block_kv: int) -> tuple[Operands, int]:
    """And on how many sides they bound what queries see; 0: rules are to be asked, or nothing is."""
    rules = element is not None or x.q_segments is not None
    if x.windows is not None or not rules or (element is not None and interval is None):
        return x, 0
    sizes: Any = {"q_len": x.query.shape[1], "kv_len": x.key.shape[1], "block_kv": block_kv}
    found = intervals.find(interval if element is not None else None, x.q_segments, x.kv_segments, **sizes)
    return (x, 0) if found is None else (x._replace(intervals=found[0]), found[1])


def _laid_out(p: Problem, x: Operands, codes: Sequence[np.ndarray]) -> Operands:
    """As the TPU reads them; `codes` of blocks come before the lists."""
    sizes: Any = {"lengths": (p.q_len, p.kv_len), "blocks": (p.tiling.block_q, p.tiling.block_kv)}
    tables = (None if steps is None else lists.pack(steps, **sizes) for steps in (x.by_row, x.by_col))
    by_row, by_col = (None if table is None else jnp.concatenate([*codes, table]) for table in tables)
    return x._replace(
        query=_flat(x.query, p.width),
        key=_flat(x.key if p.marks is None else marked_keys(p.marks, x.key), p.width),
        value=_flat(x.value, p.value_width, 1),
        kv_bias=None if x.kv_bias is None else x.kv_bias[:, :, None],
        q_segments=None if x.q_segments is None else x.q_segments[:, None],
        kv_segments=None if x.kv_segments is None else x.kv_segments[:, None],
        intervals=None
        if x.intervals is None
        else intervals.whole(x.intervals, p.rows * p.tiling.block_q, p.columns * p.tiling.block_kv),
        by_row=by_row,
        by_col=by_col,
    )


def _whole(width: int) -> int:
    return -(-width // LANES) * LANES


def _flat(x: Array, width: int, fill: int = 0) -> Array:
    """Heads side by side in whole tiles of lanes: device memory has no smaller ones, so nothing grows."""
    padding = [(0, 0)] * 3 + [(0, width - x.shape[-1])]
    return jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(p: Problem | gpu.Problem, operands: Operands) -> tuple[Float[Array, "B T *NV"], Float[Array, "B N T"]]:
    return _run(p, operands)


@functools.partial(jax.jit, static_argnums=0)
def _run(p: Problem | gpu.Problem, operands: Operands) -> tuple[Array, Array]:
    if isinstance(p, gpu.Problem):
        return forward_gpu.forward(p, operands.by_row, operands.named())
    out, lse = forward_tpu.forward(p, operands.by_row, operands.named() | {"lines": scores.lines(p, operands.lines)})
    return out, lse[:, :, 0, : p.q_len]


def attend_forward(p: Problem | gpu.Problem, operands: Any) -> Any:
    trained = {f"captured{i}": x for i, x in enumerate(operands.captured)}
    trained |= {name: getattr(operands, name) for name in ("kv_bias", "lines", "table")}
    notes = {name: noted(x.perturbed) for name, x in trained.items() if x is not None}
    operands = jax.tree.map(lambda x: x.value, operands)
    out, lse = once(functools.partial(_run, p), operands)
    return (out, lse), (operands, out, lse, notes)


def attend_backward(p: Problem | gpu.Problem, residuals: Any, cotangents: tuple[Any, Any]) -> tuple[Operands]:
    return (once(functools.partial(_gradients, p), residuals, *zeros_for_symbols(cotangents)),)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(p: Problem | gpu.Problem, residuals: Any, d_out: Array, d_lse: Array) -> Operands:
    operands, out, lse, notes = residuals
    wanted = {name for name, note in notes.items() if was_noted(note)}
    products = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).reshape(*out.shape[:2], p.heads, p.value_width)
    delta = jnp.moveaxis(jnp.sum(products, axis=-1), 1, 2) - d_lse
    dead = lse == -jnp.inf
    shift, delta = jnp.where(dead, jnp.inf, lse), jnp.where(dead, 0, delta)
    rows = {"out_gradient": d_out.astype(p.dtype), "shift": shift * scores.LOG2E, "delta": delta}
    if not isinstance(p, gpu.Problem):
        padding = ((0, 0), (0, 0), (0, p.rows * p.tiling.block_q - p.q_len))
        rows["shift"] = jnp.pad(rows["shift"], padding, constant_values=jnp.inf)[:, :, None]
        rows["delta"] = jnp.pad(rows["delta"], padding)[:, :, None]
    with_bias = "kv_bias" in wanted
    with_captured = tuple(
        i for i, x in enumerate(operands.captured) if f"captured{i}" in wanted and x.dtype == jnp.float32
    )
    given = (operands.by_row, operands.by_col, operands.named() | rows)
    if isinstance(p, gpu.Problem):
        found = backward_gpu.backward(p, *given, with_bias=with_bias, with_captured=with_captured)
        if "table" in wanted and operands.alike is None:
            found["dtable"] = distances_gpu.backward(p, operands.by_row, given[-1])
        elif "table" in wanted:
            found["dtable"] = relative_gpu.backward(p, operands.alike, given[-1])
    else:
        given[-1]["lines"] = scores.lines(p, operands.lines)
        of_all: Any = {"with_bias": with_bias, "with_captured": with_captured}
        found = backward_tpu.backward(p, *given, **of_all, with_lines="lines" in wanted)
    d_sinks = None
    if operands.sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(operands.sinks[:, None] - shift) * delta, axis=(0, 2))
    gradients: dict[str, Any] = dict.fromkeys(Operands._fields)
    gradients |= {
        "query": found["dq"],
        "key": found["dk"],
        "value": found["dv"],
        "kv_bias": found.get("dkv_bias"),
        "sinks": d_sinks,
        "captured": tuple(found.get(f"dcaptured{i}") for i in range(len(operands.captured))),
        "lines": found.get("dlines"),
        "table": found.get("dtable"),
    }
    return Operands(**gradients)


attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
