"""SEA's estimate of an attention matrix, L cells wide instead of T, at a cost linear in T.

    ctx = linear attention over performer features phi of [pos | v], pos a code of the key's position
    e   = GELU(LayerNorm(Linear [ctx | v]))
    est = network(Linear e)                            [N, T, L], the network of `jattn.linear.sea_cnn`

    two-way   d = H^-1/4 Om x    phi(x) = m^-1/2 (exp(d - |x|^2 H^-1/2 / 2 - M) + 1e-4)     M, the largest d, of a row
                                                                                            or of all keys
    causal    phi(x) = relu(H^-1/4 Om x) + 1e-3        a largest d of all keys would look into the future

The selection that follows jumps where two cells change places, so everything here is computed in float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn.dispatch import Choice
from jattn.linear.arguments import LinearState
from jattn.linear.gelu import gelu
from jattn.linear.recurrence import linear_attention
from jattn.linear.sea_cnn import Image, Rows, causal_cnn, layer_norm, two_way_cnn
from jattn.linear.sea_params import CausalCNN, SEAParams, TwoWayCNN, splits_and_down
from jattn.linear.sea_selection import rows_of

EPS = 1e-6


class EstimatorState(NamedTuple):
    """What a causal estimate remembers: sums over features, and the rows that the two convolutions read."""

    sums: LinearState
    rows: tuple[Rows, Rows]


def performer_features(
    x: Float[Array, "B T N H"], projection: Float[Array, "m H"], *, is_query: bool, is_causal: bool
) -> Float[Array, "B T N m"]:
    """phi: positive features whose products stand for exp(<q, k> / sqrt H) or, if causal, for a kernel of ReLUs."""
    features, width = projection.shape
    d = width**-0.25 * jnp.einsum("btnh,mh->btnm", x, projection)
    if is_causal:
        return jax.nn.relu(d) + 1e-3
    h = jnp.sum(x**2, axis=-1, keepdims=True) * width**-0.5 / 2
    largest = jax.lax.stop_gradient(jnp.max(d, axis=-1 if is_query else (1, 3), keepdims=True))
    return features**-0.5 * (jnp.exp(d - h - largest) + 1e-4)


def two_way_positions(keep: Bool[Array, "B T"], width: int) -> Float[Array, "B T H"]:
    """Codes of the real tokens, spread over `width` channels: a token lies between two neighbours and is shared."""
    count = jnp.cumsum(keep, axis=1)
    number = count[:, -1:]
    place = (count - 1) / (number - 1 + 1e-8) * (width - 1)
    return jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(width)), 0)


def value_input(
    value: Float[Array, "B T K V"], positions: Float[Array, "B T H"], keep: Bool[Array, "B T"] | None
) -> Float[Array, "B T K both"]:
    """[pos | v]; padded tokens have neither."""
    codes = jnp.broadcast_to(positions[:, :, None].astype(value.dtype), (*value.shape[:3], positions.shape[-1]))
    both = jnp.concatenate([codes, value], axis=-1)
    return both if keep is None else jnp.where(keep[:, :, None, None], both, 0)


def performer_context(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    values: Float[Array, "B T K both"],
    projection: Float[Array, "m H"],
    keep: Bool[Array, "B T"] | None = None,
    *,
    is_causal: bool,
    segment_ids: Int[Array, "B T"] | None = None,
    state: LinearState | None = None,
    implementation: Choice = None,
) -> tuple[Float[Array, "B T N both"], LinearState]:
    """Linear attention of the features. As in the released code, padded keys count where the order is not causal."""
    phi_query = performer_features(query, projection, is_query=True, is_causal=is_causal)
    phi_key = performer_features(key, projection, is_query=False, is_causal=is_causal)
    if keep is not None and is_causal:
        phi_key = jnp.where(keep[:, :, None, None], phi_key, 0)
    return linear_attention(
        phi_query,
        phi_key,
        values,
        is_causal=is_causal,
        normalize=True,
        eps=EPS if is_causal else 0.0,
        eps_mode="z" if is_causal else "denominator",
        segment_ids=segment_ids,
        initial_state=state,
        return_state=True,
        implementation=implementation,
    )


def encode(
    context: Float[Array, "B T N both"], value: Float[Array, "B T K V"], params: SEAParams
) -> Float[Array, "B T N D"]:
    """e, of every token and head."""
    kernel, bias = params.encoder
    of_context, of_value = jnp.split(kernel, [context.shape[-1]])
    # [ctx | v] is never made: query heads that share a value share its part of the product.
    part = jnp.repeat(value @ of_value, context.shape[2] // value.shape[2], axis=2)
    return gelu(layer_norm(context @ of_context + part + bias, params.encoder_norm))


def decode_rows(encoding: Float[Array, "B T N D"], params: SEAParams, *, is_causal: bool) -> Image:
    """Rows of the images, channel = head * splits + split."""
    splits, _ = splits_and_down(is_causal)
    rows = encoding @ params.rows.kernel + params.rows.bias
    rows = rows.reshape(*rows.shape[:3], splits, -1)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def sea_estimate(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    params: SEAParams,
    keep: Bool[Array, "B T"] | None,
    *,
    position: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    state: EstimatorState | None = None,
    implementation: Choice = None,
) -> tuple[Float[Array, "B N T L"], Float[Array, "B T N D"], EstimatorState | None]:
    """`(est, e, state)` from arrays of one dtype; values of padded tokens are to be 0. Two-way there is no state."""
    is_causal = params.positions is not None
    if params.positions is None:
        everything = jnp.ones(value.shape[:2], bool)
        positions = two_way_positions(everything if keep is None else keep, query.shape[-1])
    else:
        positions = rows_of(params.positions, position)
    context, sums = performer_context(
        query,
        key,
        value_input(value, positions, keep),
        params.projection,
        keep,
        is_causal=is_causal,
        segment_ids=segment_ids,
        state=None if state is None else state.sums,
        implementation=implementation,
    )
    encoding = encode(context, value, params)
    image = decode_rows(encoding, params, is_causal=is_causal)
    if isinstance(params.cnn, TwoWayCNN):
        return two_way_cnn(image, params.cnn), encoding, None
    assert isinstance(params.cnn, CausalCNN)
    logits, rows = causal_cnn(image, params.cnn, position, None if state is None else state.rows)
    return logits, encoding, EstimatorState(sums, rows)
