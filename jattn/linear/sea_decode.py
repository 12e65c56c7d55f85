"""SEA in causal order, a few tokens at a time: any split of a sequence gives what the whole gives.

What is remembered is what the stages read of the past: sums over features, the 4 rows before of either convolution, the
sum of values, and all keys and values, of which a row reads a few.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.dispatch import Choice
from jattn.linear import arguments
from jattn.linear.arguments import LinearState
from jattn.linear.sea import attend_cells, check_inputs, mix, positions_in_segments, running_average, widened
from jattn.linear.sea_cnn import PAST
from jattn.linear.sea_estimator import EstimatorState, sea_estimate
from jattn.linear.sea_params import SEAParams, splits_and_down
from jattn.linear.sea_selection import FlattenDim, Reach, check_selection, sea_select


class SEAState(NamedTuple):
    """The past of one layer.

    Attributes:
      estimator: of the estimate.
      average: of the running mean of values.
      key, value: all so far, in order; C is how many there is room for.
      written: how many there are.
      start: where the sequence begins that the next token belongs to.
    """

    estimator: EstimatorState
    average: LinearState
    key: Float[Array, "B C K H"]
    value: Float[Array, "B C K V"]
    written: Int[Array, " B"]
    start: Int[Array, " B"]


def init_sea_state(
    params: SEAParams, batch: int, capacity: int, *, num_kv_heads: int | None = None, dtype: Any = jnp.float32
) -> SEAState:
    """The state before the first token.

    Args:
      params: of the layer; causal.
      batch, capacity: B, and C: the most tokens that will be read.
      num_kv_heads: K; `None` means N.
      dtype: of keys and values; sums and rows are kept in float32 or wider.

    Raises:
      ValueError: more tokens than `params` has positions, or a count below 1.
    """
    checks.check_count("batch", batch)
    checks.check_count("capacity", capacity)
    if not isinstance(params, SEAParams) or params.positions is None:
        raise TypeError("params: expected SEAParams of a causal layer, whose positions are a table")
    if capacity > params.positions.shape[0]:
        raise ValueError(
            f"capacity: expected at most the {params.positions.shape[0]} positions of params, got {capacity}"
        )
    features, width = params.projection.shape
    value_dim = (params.encoder.kernel.shape[0] - width) // 2
    heads = params.cnn.last.bias.shape[0]
    kv_heads = heads if num_kv_heads is None else checks.check_count("num_kv_heads", num_kv_heads)
    checks.check_grouped_heads(heads, kv_heads)
    splits, _ = splits_and_down(True)
    accumulator = checks.accumulator_dtype(dtype)

    def sums(features: int, values: int) -> LinearState:
        shape = (batch, kv_heads, features)
        return LinearState(jnp.zeros((*shape, values), accumulator), jnp.zeros(shape, accumulator))

    rows = jnp.zeros((batch, PAST, params.rows.bias.shape[0] // splits, splits * heads), accumulator)
    return SEAState(
        estimator=EstimatorState(sums(features, width + value_dim), (rows, rows)),
        average=sums(1, value_dim),
        key=jnp.zeros((batch, capacity, kv_heads, width), dtype),
        value=jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
        written=jnp.zeros(batch, jnp.int32),
        start=jnp.zeros(batch, jnp.int32),
    )


def sea_continue(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    params: SEAParams,
    state: SEAState,
    *,
    k_budget: float,
    k_flatten_dim: FlattenDim = "causal_batch",
    k_oversample: float = 1.0,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Choice = None,
) -> tuple[Float[Array, "B T N V"], SEAState]:
    """T more tokens of causal `sea_attention`, whose arguments these are, and the state to pass with the next.

    `state` belongs to the segment of the first token, the one returned to that of the last. Tokens beyond its capacity
    are lost: give it room.

    Raises:
      TypeError, ValueError: as `sea_attention`.
    """
    sizes = check_inputs(query, key, value, params, True)
    check_selection(k_budget, k_flatten_dim, k_oversample)
    if k_flatten_dim in ("head", "batch"):
        raise ValueError(f"k_flatten_dim: expected 'causal_batch' or 'query' in causal order, got {k_flatten_dim!r}")
    arguments.check_segment_ids(segment_ids, sizes)
    if not isinstance(state, SEAState):
        raise TypeError(f"state: expected a SEAState, got {type(state).__name__}; start from init_sea_state")
    sizes = checks.bind_shapes(("state.key", state.key, "B C K H"), ("state.value", state.value, "B C K V"), **sizes)
    scale = arguments.scale(scale, default=sizes["H"] ** -0.5)
    selection: dict[str, Any] = {"k_budget": k_budget, "k_flatten_dim": k_flatten_dim, "k_oversample": k_oversample}
    options: dict[str, Any] = {"segment_ids": segment_ids, "implementation": implementation}

    column = state.written[:, None] + jnp.arange(sizes["T"], dtype=jnp.int32)
    position = positions_in_segments(segment_ids, query)
    old = jnp.ones(position.shape, bool) if segment_ids is None else segment_ids == segment_ids[:, :1]
    position += jnp.where(old, (state.written - state.start)[:, None], 0)
    start = column - position

    wide = widened(query, key, value, params, None, scale)
    est, encoding, estimator = sea_estimate(*wide, None, position=position, state=state.estimator, **options)
    lengths = position + 1
    cells = sea_select(jax.nn.softmax(est, axis=-1), lengths, longest=sizes["C"], **selection)
    average, sums = running_average(wide[2], state=state.average, **options)

    def write(buffer: Array, x: Array) -> Array:
        rows = jnp.arange(sizes["B"])[:, None]
        return buffer.at[rows, column].set(x.astype(buffer.dtype), mode="drop", unique_indices=True)

    keys, values = write(state.key, key), write(state.value, value)
    slots = jnp.arange(sizes["C"], dtype=jnp.int32)
    number = jnp.where(slots < state.written[:, None] + sizes["T"], slots + 1, 0)
    sparse = attend_cells(
        query,
        keys.astype(query.dtype),
        values.astype(query.dtype),
        cells,
        Reach(number, first=start, width=lengths, start=start),
        scale=scale,
        is_padded=False,
        implementation=implementation,
        **selection,
    )
    out, _ = mix(sparse, average, encoding, wide[3])
    assert estimator is not None
    after = SEAState(estimator, sums, keys, values, state.written + sizes["T"], start[:, -1])
    return out.astype(query.dtype), after


def sea_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K V"],
    params: SEAParams,
    state: SEAState,
    **options: Any,
) -> tuple[Float[Array, "B N V"], SEAState]:
    """One token of causal `sea_attention`: `sea_continue`, with its options, without the time axis."""
    arguments.check_arrays(query=query, key=key, value=value)
    checks.bind_shapes(("query", query, "B N H"), ("key", key, "B K H"), ("value", value, "B K V"))
    out, state = sea_continue(query[:, None], key[:, None], value[:, None], params, state, **options)
    return out[:, 0], state
