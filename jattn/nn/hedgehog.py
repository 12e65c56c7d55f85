"""The Hedgehog mixer: softmax attention's layer with linear attention inside, and how one becomes the other."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear.arguments import LinearState
from jattn.linear.distillation import attention_distillation_loss
from jattn.linear.hedgehog import Activation, hedgehog_feature_map
from jattn.linear.recurrence import linear_attention, linear_attention_step
from jattn.nn.carried import attend_carried
from jattn.nn.softmax import RotaryBlock, SoftmaxMixer, with_projections_of

Init = Literal["identity", "kaiming"]


class HedgehogMixer(RotaryBlock):
    """Linear attention over features that learn to mimic softmax (Zhang et al. 2024); causal.

    Projections, norms and rotary positions are those of `SoftmaxMixer`, under the same names; a map for every query
    head and one for every key head come after them. LoLCATs has a map of keys for every query head instead, which gives
    each a state of its own; `hedgehog_attention` does that too.

    Args:
      width, num_heads, num_kv_heads, head_dim, qk_norm, rope_theta, layer_index, num_layers: as in `SoftmaxMixer`.
      feature_dim: F, by default H; there are 2 F features.
      activation: which features, see `jattn.linear.hedgehog`.
      tie_qk: the query heads of a group use the map of their key head.
      init: maps start as the "identity" (the paper), ones on the diagonal where F is not H; or "kaiming" (LoLCATs),
        uniform within 1 / sqrt(H).

    State: `LinearState`, `S [B, K, 2F, H]` and `z [B, K, 2F]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        feature_dim: int | None = None,
        activation: Activation = "softmax_dim",
        tie_qk: bool = False,
        init: Init = "identity",
        layer_index: Any = 0,
        num_layers: int = 1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        del layer_index, num_layers
        super().__init__(width, param_dtype=param_dtype, rngs=rngs, **options)
        p = self.projections
        self.feature_dim = p.head_dim if feature_dim is None else checks.check_count("feature_dim", feature_dim)
        checks.check_choice("activation", activation, get_args(Activation))
        checks.check_choice("init", init, get_args(Init))
        checks.check_flags(tie_qk=tie_qk)
        self.activation = activation

        def fresh(heads: int) -> nnx.Param:
            shape = (heads, p.head_dim, self.feature_dim)
            if init == "identity":
                return nnx.Param(jnp.broadcast_to(jnp.eye(*shape[1:], dtype=param_dtype), shape))
            bound = 1 / math.sqrt(p.head_dim)
            return nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))

        self.query_map = None if tie_qk else fresh(p.num_heads)
        self.key_map = fresh(p.num_kv_heads)

    def maps(self) -> tuple[Float[Array, "N H F"], Float[Array, "K H F"]]:
        """Those of the query heads and of the key heads."""
        keys = self.key_map[...]
        if self.query_map is not None:
            return self.query_map[...], keys
        return jnp.repeat(keys, self.projections.num_heads // keys.shape[0], axis=0), keys

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        query, key, value = self.heads(x, positions)
        # As `hedgehog_attention`, in the terms that a layout splits along the sequence.
        query, key = (
            hedgehog_feature_map(part, weight, activation=self.activation)
            for part, weight in zip((query, key), self.maps(), strict=True)
        )
        op, step = linear_attention, linear_attention_step
        options: dict[str, Any] = {"segment_ids": segment_ids, "state": state, "normalize": True, "eps": 1e-12}
        out, state = attend_carried(op, step, (query, key, value), {}, **options)
        return self.projections.merge(out), state

    def distillation_loss(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        xent_factor: float = 1.0,
        mse_factor: float = 0.0,
    ) -> Float[Array, ""]:
        """`attention_distillation_loss` against the softmax attention that the same projections give."""
        return attention_distillation_loss(
            *self.heads(x, positions),
            *self.maps(),
            activation=self.activation,
            segment_ids=segment_ids,
            xent_factor=xent_factor,
            mse_factor=mse_factor,
        )

    def init_state(self, batch: int, capacity: int, dtype: Any) -> LinearState:
        """Whatever the `capacity`; float32 or wider, whatever the `dtype`."""
        del capacity
        p, dtype = self.projections, checks.accumulator_dtype(dtype)
        shape = (batch, p.num_kv_heads, 2 * self.feature_dim)
        return LinearState(jnp.zeros((*shape, p.value_dim), dtype), jnp.zeros(shape, dtype))

    def flops(self, batch: int, length: int) -> float:
        p, tokens = self.projections, batch * length
        maps = 2.0 * tokens * (p.num_heads + p.num_kv_heads) * p.head_dim * self.feature_dim
        return p.flops(tokens) + maps + 4.0 * tokens * p.num_heads * 2 * self.feature_dim * p.value_dim


def convert_attention(mixer: SoftmaxMixer, *, rngs: nnx.Rngs, **options: Any) -> HedgehogMixer:
    """A `HedgehogMixer` with a copy of the projections of `mixer`, its norms and its rotary positions.

    Its maps are fresh: train them by `HedgehogMixer.distillation_loss`, then everything by the task.

    Args:
      mixer: stays as it is.
      rngs: of the maps.
      options: `feature_dim`, `activation`, `tie_qk` and `init` of `HedgehogMixer`.
    """
    return with_projections_of(mixer, HedgehogMixer, rngs=rngs, **options)
