"""The weights of SEA's estimator, by layer, and how they start.

Channels of the two networks are heads times splits, head first. H is the width of a key, V of a value, m the number of
random features, W the width of an image and L = W * DOWN the number of cells that a row of the estimate has.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattn import checks
from jattn.linear import arguments


class Dense(NamedTuple):
    """A linear layer, kernel [in, out], or a convolution, kernel [rows, columns, in, out]."""

    kernel: Float[Array, "*window d_in d_out"]
    bias: Float[Array, " d_out"]


class Norm(NamedTuple):
    """The affine part of a LayerNorm."""

    scale: Float[Array, " width"]
    bias: Float[Array, " width"]


class CausalCNN(NamedTuple):
    """Convolutions that look 4 rows back each; see `jattn.linear.sea_cnn`."""

    norm: Norm
    first: Dense
    second: Dense
    last: Dense
    last_norm: Norm


class TwoWayCNN(NamedTuple):
    """Convolutions that look both ways; see `jattn.linear.sea_cnn`."""

    first: Dense
    second: Dense
    last: Dense


class SEAParams(NamedTuple):
    """Weights of one layer; the heads share all but the convolutions.

    Attributes:
      projection: random directions of the features; a constant, not trained.
      positions: a learned row for every position; causal only.
      encoder, encoder_norm: from [context, value] to an encoding of 2 H channels.
      rows: from an encoding to a row of every split of the image.
      gates: from an encoding to the logits of two gates.
      cnn: what sharpens the image.
    """

    projection: Float[Array, "m H"]
    positions: Float[Array, "max_length H"] | None
    encoder: Dense
    encoder_norm: Norm
    rows: Dense
    gates: Dense
    cnn: CausalCNN | TwoWayCNN


def splits_and_down(is_causal: bool) -> tuple[int, int]:
    """How many images a head has, and how many cells of the estimate one of their columns becomes."""
    return (2, 4) if is_causal else (4, 2)


def performer_projection(key: Array, num_features: int, head_dim: int, dtype: Any = jnp.float32) -> Float[Array, "m H"]:
    """Blocks of H orthogonal directions, the last one cut, each as long as a vector of H normal numbers."""
    blocks = -(-num_features // head_dim)
    directions, lengths = jax.random.split(key)
    basis, _ = jnp.linalg.qr(jax.random.normal(directions, (blocks, head_dim, head_dim), dtype))
    rows = jnp.swapaxes(basis, 1, 2).reshape(-1, head_dim)[:num_features]
    return rows * jnp.linalg.norm(jax.random.normal(lengths, (num_features, head_dim), dtype), axis=1, keepdims=True)


def init_sea_params(
    key: Array,
    *,
    num_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    predictor_length: int = 128,
    max_length: int = 2048,
    feature_factor: float = 1.0,
    is_causal: bool = True,
    dtype: Any = jnp.float32,
) -> SEAParams:
    """Fresh weights, as the released code starts them.

    Args:
      key: a random key.
      num_heads, head_dim, value_dim: N, H and V; V is H unless told.
      predictor_length: L; a multiple of 4 if causal, else of 2.
      max_length: rows of the table of positions; causal only.
      feature_factor: there are `int(H ln H / feature_factor)` random features, and at least 1.
      is_causal: which of the two networks; OPT's, else BERT's.
      dtype: of all arrays.

    Raises:
      TypeError, ValueError: a wrong option.
    """
    heads = checks.check_count("num_heads", num_heads)
    head_dim = checks.check_count("head_dim", head_dim)
    value_dim = head_dim if value_dim is None else checks.check_count("value_dim", value_dim)
    checks.check_flags(is_causal=is_causal)
    splits, down = splits_and_down(is_causal)
    length = checks.check_count("predictor_length", predictor_length)
    if length % down:
        raise ValueError(f"predictor_length: expected a multiple of {down} where is_causal={is_causal}, got {length}")
    if arguments.number("feature_factor", feature_factor) <= 0:
        raise ValueError(f"feature_factor: expected a positive number, got {feature_factor}")
    features = max(1, int(head_dim * math.log(head_dim) / feature_factor))
    width, channels, hidden = length // down, heads * splits, 2 * head_dim
    keys = iter(jax.random.split(key, 16))

    def dense(*shape: int) -> Dense:
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        kernel = jax.random.uniform(next(keys), shape, dtype, -bound, bound)
        return Dense(kernel, jax.random.uniform(next(keys), shape[-1:], dtype, -bound, bound))

    def norm(size: int) -> Norm:
        return Norm(jnp.ones(size, dtype), jnp.zeros(size, dtype))

    convolutions = dense(3, 3, channels, channels), dense(3, 3, channels, channels)
    cnn: CausalCNN | TwoWayCNN
    if is_causal:
        cnn = CausalCNN(norm(width), *convolutions, dense(1, 1, channels, heads), norm(length))
        rows = checks.check_count("max_length", max_length)
        positions = jax.random.normal(next(keys), (rows, head_dim), dtype)
    else:
        cnn, positions = TwoWayCNN(*convolutions, dense(3, 3, channels, heads)), None
    return SEAParams(
        projection=performer_projection(next(keys), features, head_dim, dtype),
        positions=positions,
        encoder=dense(head_dim + 2 * value_dim, hidden),
        encoder_norm=norm(hidden),
        rows=dense(hidden, width * splits),
        gates=dense(hidden, 2),
        cnn=cnn,
    )


def check_params(params: Any, sizes: dict[str, int], is_causal: bool) -> dict[str, int]:
    """`sizes` with W, L and what else `params` fixes."""
    if not isinstance(params, SEAParams):
        raise TypeError(f"params: expected SEAParams, got {type(params).__name__}; see init_sea_params")
    network = CausalCNN if is_causal else TwoWayCNN
    if not isinstance(params.cnn, network):
        raise TypeError(
            f"params.cnn: expected {network.__name__} where is_causal={is_causal}, got {type(params.cnn).__name__}"
        )
    if is_causal != (params.positions is not None):
        has = "needs a table [max_length, H]" if is_causal else "has no use for a table"
        raise ValueError(f"params.positions: is_causal={is_causal} {has}, got {type(params.positions).__name__}")
    splits, down = splits_and_down(is_causal)
    known = {"H": sizes["H"], "N": sizes["N"]}
    known |= {"E": sizes["H"] + 2 * sizes["V"], "D": 2 * sizes["H"], "C": splits * sizes["N"]}
    kernels = {
        "encoder": (params.encoder, "E D"),
        "rows": (params.rows, "D R"),
        "gates": (params.gates, "D 2"),
        "cnn.first": (params.cnn.first, "3 3 C C"),
        "cnn.second": (params.cnn.second, "3 3 C C"),
        "cnn.last": (params.cnn.last, "1 1 C N" if is_causal else "3 3 C N"),
    }
    specs = [("params.projection", params.projection, "m H"), ("params.positions", params.positions, "max_length H")]
    for name, (layer, letters) in kernels.items():
        specs += [(f"params.{name}.kernel", layer.kernel, letters), (f"params.{name}.bias", layer.bias, letters[-1])]
    found = checks.bind_shapes(*specs, **known)
    if found["R"] == 0 or found["R"] % splits:
        raise ValueError(f"params.rows.kernel: expected [D, R] with R a multiple of {splits}, got R = {found['R']}")
    found["W"] = found["R"] // splits
    found["L"] = found["W"] * down
    norms = {"encoder_norm": (params.encoder_norm, "D")}
    if isinstance(params.cnn, CausalCNN):
        norms |= {"cnn.norm": (params.cnn.norm, "W"), "cnn.last_norm": (params.cnn.last_norm, "L")}
    specs = [
        (f"params.{name}.{field}", x, letter)
        for name, (norm, letter) in norms.items()
        for field, x in zip(Norm._fields, norm, strict=True)
    ]
    checks.bind_shapes(*specs, **found)
    checks.check_floating(**{f"params{jax.tree_util.keystr(k)}": x for k, x in jax.tree.leaves_with_path(params)})
    if is_causal and "T" in sizes and found["max_length"] < sizes["T"]:
        raise ValueError(
            f"params.positions: a table of {found['max_length']} positions is too short for {sizes['T']} tokens"
        )
    return {**sizes, **{letter: found[letter] for letter in ("m", "W", "L")}}
