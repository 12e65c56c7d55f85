"""The same ops on a mesh, split by batch, by heads and along the sequence.

`shard_attention(op, mesh, ...)` gives a function that takes and returns global arrays. Batch and heads are
independent. Along the sequence (context parallelism) a device holds a piece of the tokens and
- linear attention exchanges states: S_in[i] = S[i-1] + decay[i-1] * S_in[i-1], one `[H, V]` state per head and device;
- the delta rule exchanges affine maps of states: S_in[i] = R[i-1] + M[i-1] S_in[i-1], with an `[H, H]` matrix M;
- a sliding window fetches the keys and values within reach of its neighbours (a halo exchange);
- softmax attention passes keys and values round a ring and merges the partial results by their log-sum-exp (Liu et al.
2023);
- neighborhood attention fetches rows of the first axis of its grid likewise;
- block-sparse attention gathers keys and values and sends queries, with the lists of their blocks, to where there is
  least work; so does softmax attention under a mask that is neither full nor causal.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jattn import masks
from jattn.dot_product import dot_product_attention, merge_attentions
from jattn.halo import neighbours
from jattn.linear.arguments import LinearState
from jattn.linear.delta_rule import delta_rule
from jattn.linear.gated import gated_delta_rule, kda, simple_gla
from jattn.linear.lightning import lightning_attention
from jattn.linear.recurrence import linear_attention
from jattn.linear.retention import retention, retention_gamma, retention_log_decay
from jattn.neighborhood.neighborhood import neighborhood_attention
from jattn.neighborhood.on_mesh import halo_attention
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import ScoreMod, block_sparse_attention
from jattn.sparse.on_mesh import Rows, gathered_attention, own_seed, route
from jattn.sparse.sliding_window import sliding_window_attention

Axes = str | Sequence[str] | None
ARRAYS = (
    "segment_ids", "log_decay", "slopes", "gamma", "beta", "initial_state", "sinks", "captured",
    "additional_keys", "additional_values", "rel_pos_bias", "key_mask", "kv_bias",
    "dropout_seed",
)  # fmt: skip


def shard_attention(
    op: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    *,
    batch: Axes = None,
    heads: Axes = None,
    context: str | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """`op` over the axes of `mesh`.

    Args:
      op: `dot_product_attention`, `sliding_window_attention`, `block_sparse_attention`,
        `neighborhood_attention`, `linear_attention` and its named forms (`lightning_attention`, `retention`,
        `simple_gla`), `delta_rule` and its (`gated_delta_rule`, `kda`).
      mesh: the devices.
      batch, heads: mesh axes that split B, and the heads of queries, keys and values; every size must divide.
      context: the mesh axis that splits the sequence, or the first axis of a grid, into consecutive equal pieces.
      options: options of the op, none of them an array; a `BlockMask` may hold arrays, and its lists are split as the
        batch rows, heads and queries that they belong to. With `context` no device has a part of a block of queries.

    Returns:
      `f(query, key, value, **arrays)` on global arrays, which returns what the op does; `arrays` are those of `ARRAYS`
      that the op has. Every device has all that is captured, and all additional keys and values. What is dropped
      depends on `dropout_seed` and on how the call is split: no two devices drop the same.

    Raises:
      NotImplementedError: another array, another result, or a combination with `context` that is not made: the
        message names it.
      ValueError: an axis that the mesh lacks or that is named twice, sizes that do not divide over it.
      TypeError, ValueError: what the op itself raises.
    """
    table: dict[Any, Callable[..., Array]] = {
        dot_product_attention: _ring,
        sliding_window_attention: _halo,
        block_sparse_attention: gathered_attention,
        neighborhood_attention: halo_attention,
        linear_attention: _state_scan,
        lightning_attention: _lightning_scan,
        retention: _retention_scan,
        simple_gla: _simple_gla_scan,
        delta_rule: _affine_scan,
        gated_delta_rule: _affine_scan,
        kda: _affine_scan,
    }
    if op not in table:
        names = ", ".join(known.__name__ for known in table)
        raise ValueError(f"op: expected one of {names}, got {getattr(op, '__name__', op)}")
    _check_axes(mesh, batch=batch, heads=heads, context=context)
    _check_options(heads, context, options)

    def sharded(query: Array, key: Array, value: Array, **given: Any) -> Any:
        for name in given:
            if name not in ARRAYS:
                raise TypeError(f"{name}: expected one of {', '.join(ARRAYS)}")
        arrays = {name: array for name, array in given.items() if array is not None}
        if context is not None and isinstance(arrays.get("segment_ids"), tuple):
            raise NotImplementedError("segment_ids: with context, expected one array for queries and keys, got a pair")
        if context is not None and "initial_state" in arrays:
            raise NotImplementedError("initial_state: with context, the first device begins with nothing")
        # What is wrong with the call as such, the op says in the terms of the call, not of a piece of it.
        described = lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))  # noqa: E731
        unplaced = jax.tree.map(described, (query, key, value, arrays))
        whole = jax.eval_shape(lambda *operands: op(*operands[:3], **operands[3], **options), *unplaced)
        operands = (("query", query), ("key", key), ("value", value))
        _check_divides(mesh, *operands, batch=batch, heads=heads, context=context)
        ours: set[str] = set()  # arrays that nobody has placed yet
        if op is retention and "gamma" not in arrays:  # a device does not know which heads it has
            arrays["gamma"] = retention_gamma(key.shape[2])
            ours.add("gamma")

        static, on_mesh = dict(options), op
        if context is None:
            if _has_own_lists(options.get("block_mask")):
                arrays["block_mask"] = static.pop("block_mask")
        elif op is dot_product_attention and _is_beyond_the_ring(static.get("mask"), query, key):
            causal = masks.Causal() if static.pop("is_causal", False) else masks.Full()
            on_mesh, static["block_mask"] = block_sparse_attention, causal & static.pop("mask")
        if context is not None and on_mesh is block_sparse_attention:
            block_mask = static.pop("block_mask")
            arrays["rows"], static["route"] = route(block_mask, query.shape[1], key.shape[1], mesh.shape[context])
            ours.add("rows")
        token, state = P(batch, context, *[None] * (query.ndim - 4), heads, None), P(batch, heads)
        gate = {1: P(heads), 3: P(batch, context, heads), 4: token}
        specs: dict[str, Any] = {"segment_ids": P(batch, context), "slopes": P(heads), "gamma": P(heads)}
        specs |= {"beta": gate[3], "initial_state": state, "sinks": P(heads), "captured": P()}
        specs |= {"key_mask": P(batch, context), "rel_pos_bias": P(heads), "kv_bias": P(batch, heads, context)}
        specs |= dict.fromkeys(("additional_keys", "additional_values"), P(batch, None, heads))
        specs["dropout_seed"] = P()
        if "log_decay" in arrays:
            specs["log_decay"] = gate[arrays["log_decay"].ndim]
        if "block_mask" in arrays:
            specs["block_mask"] = _split_lists(arrays["block_mask"], batch, heads)
        if "rows" in arrays:
            specs["rows"] = _split_rows(arrays["rows"], batch, heads, context)
        for name in ours if AxisType.Explicit in mesh.axis_types else ():
            placed = jax.tree.map(functools.partial(_on_explicit_axes, mesh), specs[name])
            arrays[name] = jax.sharding.reshard(arrays[name], placed)

        def body(query: Array, key: Array, value: Array, arrays: dict[str, Any]) -> Any:
            options = static
            if options.get("score_mod") is not None:
                origin = jnp.stack([_first(batch, query.shape[0]), _first(heads, query.shape[2])])
                arrays = {**arrays, "captured": (origin, *arrays.get("captured", ()))}
                options = {**options, "score_mod": _from_origin(options["score_mod"])}
            if options.get("dropout_rate"):
                seed = arrays.get("dropout_seed", options.get("dropout_seed"))
                arrays = {**arrays, "dropout_seed": own_seed(seed, (*_names(batch), *_names(heads)))}
                options = {name: option for name, option in options.items() if name != "dropout_seed"}
            if context is None:
                return op(query, key, value, **arrays, **options)
            return table[on_mesh](query, key, value, axis=context, **arrays, **options)

        in_specs = (token, token, token, {name: specs[name] for name in arrays})
        out_specs = (token, state) if isinstance(whole, tuple) else token
        return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(query, key, value, arrays)

    return sharded


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check_axes(mesh: Mesh | AbstractMesh, **named: Axes) -> None:
    used: dict[str, str] = {}
    for argument, axes in named.items():
        for axis in _names(axes):
            if axis not in mesh.shape:
                raise ValueError(f"{argument}: the mesh has the axes {', '.join(mesh.shape)}, got {axis!r}")
            if axis in used:
                raise ValueError(f"{argument}: mesh axis {axis!r} is already used by {used[axis]}")
            used[axis] = argument
    if not isinstance(named["context"], (str, type(None))):
        raise TypeError(f"context: expected the name of one mesh axis, got {named['context']!r}")


def _check_options(heads: Axes, context: str | None, options: dict[str, Any]) -> None:
    for name, option in options.items():
        arrays = [] if name == "block_mask" else jax.tree.leaves(option)
        if any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in arrays):
            raise NotImplementedError(
                f"{name}: arrays are split over the mesh only as query, key, value, {', '.join(ARRAYS)}"
            )
        if (name == "return_lse" or (name == "return_state" and context is not None)) and option:
            raise NotImplementedError(f"{name}: only the output is returned from the mesh")
    if heads is not None and (reads_heads(options.get("mask")) or reads_heads(options.get("block_mask"))):
        raise NotImplementedError(
            "mask: an Fn may read the index of its head, which a device does not know; heads=None"
        )


def reads_heads(mask: Any) -> bool:
    mask = mask.mask if isinstance(mask, BlockMask) else mask
    parts = getattr(mask, "terms", None) or (getattr(mask, "term", None),)
    return isinstance(mask, masks.Fn) or any(part is not None and reads_heads(part) for part in parts)


def _check_divides(
    mesh: Mesh | AbstractMesh, *named: tuple[str, Array], batch: Axes, heads: Axes, context: Axes
) -> None:
    for name, x in named:
        for dimension, axes in ((0, batch), (1, context), (x.ndim - 2, heads)):
            devices = math.prod(mesh.shape[axis] for axis in _names(axes))
            if x.shape[dimension] % devices:
                raise ValueError(
                    f"{name}: dimension {dimension} of {tuple(x.shape)} does not divide over {devices} devices "
                    f"of mesh axis {axes}"
                )


def _has_own_lists(block_mask: Any) -> bool:
    """Whether lists belong to batch rows or heads, or are traced; static lists for all are constants everywhere."""
    if not isinstance(block_mask, BlockMask):
        return False
    return not block_mask.is_static or block_mask.kv_idx.shape[:2] != (1, 1)


def _split_lists(block_mask: BlockMask, batch: Axes, heads: Axes) -> Any:
    """How the arrays of a mask are split: its lists as the batch rows and heads that have some of their own."""
    rows, lists = block_mask.kv_idx.shape[:2]
    spec = P(batch if rows > 1 else None, heads if lists > 1 else None)
    specs = jax.tree.map(lambda _: spec, block_mask)
    return specs if block_mask.bank is None else dataclasses.replace(specs, bank=P())


def _split_rows(rows: Rows, batch: Axes, heads: Axes, context: Axes) -> Any:
    """The same, and rows as the queries in them."""
    each, lists = rows.lists.idx.shape[:2]
    spec = P(batch if each > 1 else None, heads if lists > 1 else None, context)
    specs = jax.tree.map(lambda _: spec, rows)
    return specs if rows.bank is None else specs._replace(bank=P())


def _on_explicit_axes(mesh: Mesh | AbstractMesh, spec: P) -> NamedSharding:
    """How an array has to lie already before it is split by `spec`: the compiler sees to the other axes."""
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    return NamedSharding(mesh, P(*[tuple(name for name in _names(axes) if name in explicit) or None for axes in spec]))


def _is_beyond_the_ring(mask: masks.Mask | None, query: Array, key: Array) -> bool:
    """Whether softmax attention is under a mask that is neither full nor causal from one piece to the next."""
    return mask not in (None, masks.Full()) and (mask != masks.Causal() or query.shape[1] != key.shape[1])


def _first(axes: Axes, count: int) -> Array:
    """Where this device's `count` batch rows or heads begin."""
    return jax.lax.axis_index(_names(axes)) * count if _names(axes) else jnp.int32(0)


@functools.lru_cache(maxsize=64)
def _from_origin(score_mod: ScoreMod) -> ScoreMod:
    """`score_mod` of the batch rows and heads that begin at `origin`."""

    def score(x: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array, origin: Array, *captured: Any) -> Array:
        return score_mod(x, b + origin[0], h + origin[1], q_pos, kv_pos, *captured)

    return score


def _ring(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: str,
    is_causal: bool = False,
    mask: masks.Mask | None = None,
    segment_ids: Array | None = None,
    sinks: Array | None = None,
    **options: Any,
) -> Array:
    """Softmax attention with keys and values passed from device to device.

    After r passes device i holds the keys of device i - r. Causally, pass 0 is the diagonal, and a later pass counts
    where i >= r: those keys are all earlier. Sinks take part in pass 0.
    """
    causal = is_causal or mask == masks.Causal()
    devices = jax.lax.axis_size(axis)
    index = jax.lax.axis_index(axis)
    forward = [(i, (i + 1) % devices) for i in range(devices)]
    outs, lses = [], []
    held: Any = (key, value, segment_ids)
    for passed in range(devices):
        if passed:
            held = jax.tree.map(lambda x: jax.lax.ppermute(x, axis, forward), held)
        held_key, held_value, held_ids = held
        out, lse = dot_product_attention(
            query,
            held_key,
            held_value,
            is_causal=causal and passed == 0,
            segment_ids=None if segment_ids is None else (segment_ids, held_ids),
            sinks=None if passed else sinks,
            return_lse=True,
            **options,
        )
        outs.append(out)
        lses.append(jnp.where(index >= passed, lse, -jnp.inf) if causal else lse)
    return merge_attentions(outs, lses)[0].astype(query.dtype)


def _halo(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: str,
    window: int | tuple[int, int],
    offset: int | None = None,
    segment_ids: Array | None = None,
    **options: Any,
) -> Array:
    """A sliding window whose keys beyond the own piece come from the neighbours."""
    if offset or query.shape[1] != key.shape[1]:
        raise NotImplementedError("context: the halo exchange does as many queries as keys, both from position 0")
    left, right = window if isinstance(window, tuple) else (window - 1, 0)
    others = (jax.lax.axis_size(axis) - 1) * key.shape[1]
    back, ahead = min(left, others), min(right, others)
    own = jnp.ones(query.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    nothing = jax.lax.pmin(jnp.min(own), axis) - 1
    before = neighbours(back, axis, key, value, own - nothing)
    after = neighbours(-ahead, axis, key, value, own - nothing)
    keys, values, ids = (
        jnp.concatenate([a, b, c], axis=1) for a, b, c in zip(before, (key, value, own - nothing), after, strict=True)
    )
    # A device at the end receives zeros, and no token has segment 0.
    return sliding_window_attention(
        query, keys, values, window=(left, right), offset=back, segment_ids=(own - nothing, ids), **options
    )


def _lightning_scan(
    query: Array, key: Array, value: Array, *, axis: str, slopes: Array | None = None, **options: Any
) -> Array:
    return _state_scan(query, key, value, axis=axis, log_decay=None if slopes is None else -slopes, **options)


def _retention_scan(query: Array, key: Array, value: Array, *, axis: str, gamma: Array, **options: Any) -> Array:
    log_decay = retention_log_decay(gamma, key.shape[2], query.dtype)
    return _simple_gla_scan(query, key, value, axis=axis, log_decay=log_decay, **options)


def _simple_gla_scan(
    query: Array, key: Array, value: Array, *, axis: str, scale: float | None = None, **options: Any
) -> Array:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _state_scan(query, key, value, axis=axis, scale=scale, **options)


def _state_scan(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: str,
    log_decay: Array | None = None,
    segment_ids: Array | None = None,
    is_causal: bool = True,
    **options: Any,
) -> Array:
    """Causal linear attention that starts every piece from the state at the end of the pieces before it."""
    if not is_causal or options.get("reverse"):
        what = "reverse" if is_causal else "is_causal=False"
        raise NotImplementedError(f"context: the state scan does causal linear attention without {what}")
    arguments = (query, key, value, log_decay)
    keywords: dict[str, Any] = {"segment_ids": segment_ids, "is_causal": True, **options}
    _, local = linear_attention(*arguments, return_state=True, **keywords)
    # kept: [B, K, H], of what enters the piece; nothing passes through one in which a segment begins.
    if log_decay is None:
        kept = jnp.ones((1, 1, 1), local.S.dtype)
    elif log_decay.ndim == 1:
        kept = jnp.exp(log_decay.astype(local.S.dtype) * key.shape[1])[None, :, None]
    else:
        summed = jnp.sum(log_decay.astype(local.S.dtype), axis=1)
        kept = jnp.exp(summed if summed.ndim == 3 else summed[..., None])
    if segment_ids is not None:
        kept = jnp.where((segment_ids[:, 0] == segment_ids[:, -1])[:, None, None], kept, 0)
    kept = jnp.broadcast_to(kept, local.S.shape[:3])

    def leaves(piece: tuple[LinearState, Array], state: LinearState) -> LinearState:
        local, kept = piece
        S = local.S + kept[..., None] * state.S
        return LinearState(S, None if local.z is None or state.z is None else local.z + kept * state.z)

    start = jax.tree.map(jnp.zeros_like, local)
    entering = _entering(leaves, (local, kept), start, segment_ids, axis)
    return linear_attention(*arguments, initial_state=entering, **keywords)


def _affine_scan(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: str,
    beta: Array | None = None,
    log_decay: Array | None = None,
    segment_ids: Array | None = None,
    **options: Any,
) -> Array:
    """The delta rule that starts every piece from the state at the end of the pieces before it.

    A piece takes a state S to R + M S. R is what it makes of 0 with its values, M what it makes of I without: one run
    with the channels of both.
    """
    if options.get("reverse"):
        raise NotImplementedError("context: the state scan does the delta rule without reverse")
    batch, length, heads, width = *value.shape[:3], query.shape[3]
    nothing = jnp.zeros((batch, length, heads, width), value.dtype)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    S = jnp.broadcast_to(jnp.eye(width, dtype=dtype), (batch, heads, width, width))
    S = jnp.concatenate([jnp.zeros((*S.shape[:3], value.shape[3]), dtype), S], axis=-1)
    values = jnp.concatenate([value, nothing], axis=-1)
    gates: dict[str, Any] = {"beta": beta, "log_decay": log_decay, "segment_ids": segment_ids, **options}
    _, local = delta_rule(key, key, values, initial_state=LinearState(S, None), return_state=True, **gates)
    R, M = local.S[..., : value.shape[3]], local.S[..., value.shape[3] :]
    start = LinearState(jnp.zeros_like(R), None)
    entering = _entering(
        lambda piece, s: LinearState(piece[0] + piece[1] @ s.S, None), (R, M), start, segment_ids, axis
    )
    return delta_rule(query, key, value, initial_state=entering, **gates)


def _entering(
    leaves: Callable[[Any, LinearState], LinearState],
    piece: Any,
    start: LinearState,
    segment_ids: Array | None,
    axis: str,
) -> LinearState:
    """The state that enters this device's piece; `leaves(piece, state)` is the one after a piece that `state` enters.

    A state goes on into the next piece if this begins with the segment that the last one ended in.
    """
    first = last = jnp.zeros((start.S.shape[0],), jnp.int32)
    if segment_ids is not None:
        first, last = segment_ids[:, 0], segment_ids[:, -1]
    pieces, first, last = jax.lax.all_gather((piece, first, last), axis)
    onward = last == jnp.roll(first, -1, axis=0)

    def step(state: LinearState, piece: tuple[Any, Array]) -> tuple[LinearState, LinearState]:
        after = leaves(piece[0], state)
        return jax.tree.map(lambda x: jnp.where(piece[1].reshape(-1, *[1] * (x.ndim - 1)), x, 0), after), state

    _, before = jax.lax.scan(step, start, (pieces, onward))
    return jax.tree.map(lambda x: x[jax.lax.axis_index(axis)], before)
