"""A decoder-only language model whose token mixers are named by a repeating pattern.

    h = embed(tokens);  h = h + mixer_l(norm(h)), h = h + mlp(norm(h)) for every layer l;  logits = norm(h) W_head

`pattern = ("lightning", "lightning", "sliding_window")` repeats until `num_layers` is reached. One repetition is a
*unit*; the parameters of all units are stacked and the units are scanned, so 24 layers compile about as fast as 6.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import catalog, checks
from jattn.nn.blocks import Block, make_mlp, make_norm
from jattn.nn.cross_entropy import chunked_cross_entropy
from jattn.nn.layout import each_token, pin
from jattn.nn.mixer import State

Remat = Literal["none", "dots", "full"]

_REMAT: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Everything that fixes a language model's parameters and its function.

    Attributes:
      vocab_size: number of tokens; 256 for bytes.
      width: D, channels of the residual stream.
      num_layers: a multiple of the pattern's length.
      pattern: mixers by catalog name, first layer first.
      num_heads, num_kv_heads, head_dim: N, K, H; K defaults to N, H to D / N.
      mlp, mlp_width: "swiglu" or "gelu" and its hidden channels; "none" leaves the mixers by themselves.
      norm: "rmsnorm" or "layernorm".
      tied: whether the head is the embedding transposed.
      logits_soft_cap: c in c tanh(logits / c), or `None`.
      mixer_options: options of a mixer's constructor, by its catalog name.
      dtype, param_dtype: of the computation and of the master weights.
      remat: what a layer's backward pass computes again: "none", "dots" (all but matmul results) or "full".
    """

    vocab_size: int = 256
    width: int = 256
    num_layers: int = 6
    pattern: tuple[str, ...] = ("lightning", "lightning", "sliding_window")
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp: Literal["swiglu", "gelu", "none"] = "swiglu"
    mlp_width: int = 704
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    tied: bool = False
    logits_soft_cap: float | None = None
    mixer_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width"):
            checks.check_count(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                checks.check_count(name, getattr(self, name))
        if self.logits_soft_cap is not None and not 0 < self.logits_soft_cap < float("inf"):
            raise ValueError(f"logits_soft_cap: expected a positive number or None, got {self.logits_soft_cap}")
        if isinstance(self.pattern, str):
            raise TypeError(
                f"pattern: expected a tuple of mixer names, got the string {self.pattern!r}; write ({self.pattern!r},)"
            )
        if not self.pattern:
            raise ValueError("pattern: expected at least one mixer name")
        for name in self.pattern:
            catalog.get(name).load_layer()
        if self.num_layers % len(self.pattern):
            raise ValueError(
                f"num_layers: {self.num_layers} is no multiple of the pattern's length {len(self.pattern)}; "
                f"{self.num_layers + -self.num_layers % len(self.pattern)} would be"
            )
        for name in self.mixer_options:
            if name not in self.pattern:
                raise ValueError(f"mixer_options: {name!r} is not in the pattern {self.pattern}")
        checks.check_choice("mlp", self.mlp, ("swiglu", "gelu", "none"))
        checks.check_choice("norm", self.norm, ("rmsnorm", "layernorm"))
        checks.check_choice("remat", self.remat, ("none", *_REMAT))

    @property
    def num_units(self) -> int:
        return self.num_layers // len(self.pattern)


class Unit(nnx.Module):
    """One repetition of the pattern."""

    def __init__(self, config: LMConfig, unit_index: Int[Array, ""] | int, *, rngs: nnx.Rngs):
        settings: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs
        }  # fmt: skip
        blocks = []
        for index, name in enumerate(config.pattern):
            mixer = catalog.get(name).load_layer()(
                config.width,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                layer_index=unit_index * len(config.pattern) + index,
                num_layers=config.num_layers,
                **config.mixer_options.get(name, {}),
                **settings,
            )
            mlp = make_mlp(config.mlp, config.width, config.mlp_width, **settings)
            norms = [make_norm(config.norm, config.width, **settings) for _ in range(1 if mlp is None else 2)]
            blocks.append(Block(mixer, mlp, *norms))
        self.blocks = nnx.List(blocks)

    def __call__(
        self, x: Float[Array, "B T D"], *, positions: Array, segment_ids: Array | None, state: tuple[State, ...] | None
    ) -> tuple[Float[Array, "B T D"], tuple[State, ...] | None]:
        states = []
        for index, block in enumerate(self.blocks):
            given = None if state is None else state[index]
            x, block_state = block(pin(x), positions=positions, segment_ids=segment_ids, state=given)
            states.append(block_state)
        return pin(x), None if state is None else tuple(states)


class LMState(nnx.Pytree):
    """What a model carries from one call to the next: the mixers' states, stacked by unit, and the next position."""

    def __init__(self, mixers: Any, position: Int[Array, " B"]):
        self.mixers = nnx.data(mixers)
        self.position = nnx.data(position)


class LM(nnx.Module):
    """The language model that `config` describes. Parameters start from `rngs`; output layers start at zero."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.width,
            embedding_init=nnx.initializers.normal(config.width**-0.5 if config.tied else 1.0),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        keys = jax.random.split(rngs.params(), config.num_units)
        build = nnx.vmap(lambda key, index: Unit(config, index, rngs=nnx.Rngs(params=key)), in_axes=(0, 0))
        self.units = build(keys, jnp.arange(config.num_units))
        self.norm = make_norm(config.norm, config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        head = nnx.Linear(
            config.width,
            config.vocab_size,
            use_bias=False,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.head = None if config.tied else head

    def head_matrix(self) -> Float[Array, "D vocab"]:
        """The output matrix, in the parameters' dtype."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: LMState | None = None,
    ) -> tuple[Float[Array, "B T D"], LMState | None]:
        """What the head reads, and the state after the last token when one was given.

        Args:
          tokens: ids below `vocab_size`.
          positions: default to 0, 1, ... from the state's position.
          segment_ids: packed documents; a token sees its own segment only.
          state: from `init_state` or from an earlier call.
        """
        sizes = checks.bind_shapes(
            ("tokens", tokens, "B T"), ("positions", positions, "B T"), ("segment_ids", segment_ids, "B T")
        )
        checks.check_integer(tokens=tokens, positions=positions, segment_ids=segment_ids)
        if positions is None:
            start = jnp.zeros((sizes["B"], 1), jnp.int32) if state is None else state.position[:, None]
            positions = start + jnp.arange(sizes["T"], dtype=jnp.int32)
        graph, parameters = nnx.split(self.units)

        def unit(x: Array, slice_: tuple[Any, Any]) -> tuple[Array, Any]:
            unit_parameters, unit_state = slice_
            module = nnx.merge(graph, unit_parameters)
            return module(x, positions=positions, segment_ids=segment_ids, state=unit_state)

        if self.config.remat != "none":
            unit = jax.checkpoint(unit, policy=_REMAT[self.config.remat], prevent_cse=False)
        mixers = None if state is None else state.mixers
        x, mixers = jax.lax.scan(unit, self.embed(tokens), (parameters, mixers))
        x = self.norm(x)
        if state is None:
            return x, None
        return x, LMState(mixers, positions[:, -1] + 1)

    def __call__(self, tokens: Int[Array, "B T"], **context: Any) -> tuple[Float[Array, "B T vocab"], LMState | None]:
        """Logits in float32 (or wider) and the state; keywords as in `hidden`."""
        x, state = self.hidden(tokens, **context)
        return self.logits(x), state

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """The head, in float32 (or wider)."""
        dtype = checks.accumulator_dtype(hidden.dtype)
        matrix = self.head_matrix().astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, matrix, preferred_element_type=dtype)
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """Cross-entropy of every target in nats, without a `[B, T, vocab]` array."""
        x, _ = self.hidden(tokens, positions=positions, segment_ids=segment_ids)
        loss = functools.partial(chunked_cross_entropy, soft_cap=self.config.logits_soft_cap)
        return each_token(loss, x, self.head_matrix(), targets)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> LMState:
        """An empty state for texts of at most `capacity` tokens. `dtype` is that of cached keys and values."""
        checks.check_count("batch", batch)
        checks.check_count("capacity", capacity)
        dtype = jnp.dtype(self.config.dtype) if dtype is None else dtype
        graph, parameters = nnx.split(self.units)
        unit = nnx.merge(graph, jax.tree.map(lambda x: x[0], parameters))  # some states have sizes of weights
        one = tuple(block.mixer.init_state(batch, capacity, dtype) for block in unit.blocks)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.num_units, *x.shape)), one)
        return LMState(stacked, jnp.zeros((batch,), jnp.int32))

    def flops(self, batch: int, length: int) -> float:
        """Multiply-adds times two of a forward pass over `[batch, length]` tokens; training takes three times that."""
        head = 2.0 * batch * length * self.config.width * self.config.vocab_size
        return head + self.config.num_units * sum(block.flops(batch, length) for block in self.units.blocks)


def count_parameters(model: nnx.Module) -> int:
    """How many trained numbers the model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
