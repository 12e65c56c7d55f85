"""The SEA mixer: softmax attention's layer with an estimated sparse mask, and how one becomes the other."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.dot_product import dot_product_attention
from jattn.linear.sea import sea_attention
from jattn.linear.sea_decode import SEAState, init_sea_state, sea_continue
from jattn.linear.sea_loss import sea_distillation_loss
from jattn.linear.sea_params import SEAParams, init_sea_params
from jattn.linear.sea_selection import check_selection
from jattn.nn.softmax import RotaryBlock, SoftmaxMixer, with_projections_of


class Weights(nnx.Module):
    """Named tuples of arrays as parameters of the same names; those in `constants` are not trained."""

    def __init__(self, tree: Any, constants: tuple[str, ...] = ()):
        self.kind = type(tree)
        for name, x in zip(tree._fields, tree, strict=True):
            leaf = nnx.Variable if name in constants else nnx.Param
            setattr(self, name, Weights(x) if isinstance(x, tuple) else leaf(x))

    def tree(self) -> Any:
        parts = (getattr(self, name) for name in self.kind._fields)
        return self.kind(*(part.tree() if isinstance(part, Weights) else part[...] for part in parts))


class SEAMixer(RotaryBlock):
    """Sparse attention to the keys that a linear-cost estimate singles out (Lee et al. 2024); causal.

    Projections, norms and rotary positions are those of `SoftmaxMixer`, under the same names. The estimator, which sees
    rotated queries and keys, has a table of positions besides.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, use_bias, qk_norm, rope_theta, layer_index, num_layers: as in
        `SoftmaxMixer`.
      k_budget: keys per row and head that are read, on average.
      predictor_length: L, cells of a row of the estimate; a multiple of 4.
      feature_factor: divides the number of random features, `int(H ln H)`.
      max_length: the longest sequence.

    State: `SEAState`, keys and values for `capacity` tokens and sums and rows in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        k_budget: float = 64,
        predictor_length: int = 256,
        feature_factor: float = 1.0,
        max_length: int = 2048,
        layer_index: Any = 0,
        num_layers: int = 1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        del layer_index, num_layers
        super().__init__(width, param_dtype=param_dtype, rngs=rngs, **options)
        check_selection(k_budget, "causal_batch", 1.0)
        self.k_budget = k_budget
        p = self.projections
        weights = init_sea_params(
            rngs.params(),
            num_heads=p.num_heads,
            head_dim=p.head_dim,
            value_dim=p.value_dim,
            predictor_length=predictor_length,
            max_length=max_length,
            feature_factor=feature_factor,
            dtype=param_dtype,
        )
        self.estimator = Weights(weights, constants=("projection",))

    def params(self) -> SEAParams:
        """The weights of the estimator."""
        return self.estimator.tree()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: SEAState | None = None,
    ) -> tuple[Float[Array, "B T D"], SEAState | None]:
        heads, params = self.heads(x, positions), self.params()
        options: dict[str, Any] = {"k_budget": self.k_budget, "segment_ids": segment_ids}
        if state is None:
            return self.projections.merge(sea_attention(*heads, params, **options)), None
        out, state = sea_continue(*heads, params, state, **options)
        return self.projections.merge(out), state

    def distillation_loss(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, ""]:
        """`sea_distillation_loss` against the softmax attention that the same projections give."""
        query, key, value = self.heads(x, positions)
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
        accumulator = checks.accumulator_dtype(query.dtype)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=accumulator)
        logits = query.shape[-1] ** -0.5 * logits.reshape(query.shape[0], query.shape[2], *logits.shape[-2:])
        output = dot_product_attention(query, key, value, is_causal=True, segment_ids=segment_ids)
        options: dict[str, Any] = {"k_budget": self.k_budget, "segment_ids": segment_ids}
        return sea_distillation_loss(query, key, value, self.params(), logits, output, **options)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> SEAState:
        return init_sea_state(self.params(), batch, capacity, num_kv_heads=self.projections.num_kv_heads, dtype=dtype)

    def flops(self, batch: int, length: int) -> float:
        # By their last axes: in a model the layers are stacked, and of one that is only described there are no arrays.
        weights: Any = self.estimator
        p, tokens = self.projections, batch * length
        features, head_dim = weights.projection.shape[-2:]
        channels, width = weights.cnn.first.kernel.shape[-1], weights.rows.bias.shape[-1] // 2
        performer = features * ((p.num_heads + p.num_kv_heads) * head_dim + 2 * p.num_heads * (head_dim + p.value_dim))
        layers = (weights.encoder, weights.rows, weights.gates)
        by_head = sum(math.prod(layer.kernel.shape[-2:]) for layer in layers)
        convolutions = width * (2 * 9 * channels**2 + channels * p.num_heads)
        sparse = p.num_heads * min(self.k_budget, length) * (head_dim + p.value_dim)
        return p.flops(tokens) + 2.0 * tokens * (performer + p.num_heads * by_head + convolutions + sparse)


def convert_to_sea(mixer: SoftmaxMixer, *, rngs: nnx.Rngs, **options: Any) -> SEAMixer:
    """A `SEAMixer` with a copy of the projections of `mixer`, its norms and its rotary positions.

    Its estimator is fresh: train it by `SEAMixer.distillation_loss`, with or without everything else.

    Args:
      mixer: stays as it is.
      rngs: of the estimator.
      options: `k_budget`, `predictor_length`, `feature_factor` and `max_length` of `SEAMixer`.
    """
    return with_projections_of(mixer, SEAMixer, rngs=rngs, **options)
