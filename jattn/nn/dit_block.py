"""One layer of a diffusion transformer for text, image, spatial conditions and subjects (Esser et al. 2024, figure 2).

Text and image have weights of their own; a condition has the image's, plus low-rank differences in its projections.
Every stream is modulated by a time embedding c (adaLN, Peebles and Xie 2023), for a layer f = attention or MLP:

    x <- x + (1 + gate(c)) f((1 + scale(c)) norm(x) + shift(c))        shift, scale, gate = W silu(c), W starts at zero

Conditions are clean images: theirs is c of t = 0. Together with attention to themselves only that makes their keys and
values the same at every denoising step.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dot_product import dot_product_attention
from jattn.nn.mixer import Projections, rms_normalise
from jattn.nn.mlp import MLP
from jattn.positions import apply_rotary_axes
from jattn.sparse.pka import pka_attention
from jattn.sparse.pka_streams import Outputs, Stream, Streams, Subject

Attention = Literal["pka", "full"]


class Keywords(NamedTuple):
    """Which text tokens name a subject; see `jattn.keyword_mask`."""

    ids: Int[Array, "B W"] | None
    valid: Bool[Array, "B W"] | None


class Tokens(NamedTuple):
    """Hidden states of all streams; those of conditions are left out where keys and values come from a cache."""

    text: Float[Array, "B M D"]
    image: Float[Array, "B L D"]
    spatial: tuple[Float[Array, "B L D"], ...] = ()
    subjects: tuple[Float[Array, "B S D"], ...] = ()


class KeyValues(NamedTuple):
    """`(key, value)` of every condition, `[B, S, K, H]` each."""

    spatial: tuple[tuple[Array, Array], ...]
    subjects: tuple[tuple[Array, Array], ...]


class Places(NamedTuple):
    """Row and column of every token, `[L, 2]` or `[S, 2]`. Text has none."""

    image: Int[Array, "L 2"] | None
    spatial: tuple[Int[Array, "L 2"], ...]
    subjects: tuple[Int[Array, "S 2"], ...]


class Kinds(NamedTuple):
    """Which of a model's adapters each condition of a call goes through. Static."""

    spatial: tuple[int, ...] = ()
    subjects: tuple[int, ...] = ()


class Adapter(nnx.Module):
    """Low-rank differences of four projections (Hu et al. 2021), zero at the start."""

    def __init__(self, projections: Projections, rank: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        checks.check_count("rank", rank)
        p = projections

        def low_rank(layer: nnx.Linear) -> nnx.LoRA:
            options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            return nnx.LoRA(layer.in_features, rank, layer.out_features, **options)

        self.query, self.key, self.value, self.out = (low_rank(x) for x in (p.query, p.key, p.value, p.out))

    def flops(self, tokens: int) -> float:
        """Multiply-adds times two."""
        layers = (self.query, self.key, self.value, self.out)
        return 2.0 * tokens * sum(layer.lora_a[...].size + layer.lora_b[...].size for layer in layers)


class StreamLayer(nnx.Module):
    """Norms, modulation, projections and MLP of one kind of token."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        mlp_width: int,
        rope_theta: float,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.rope_theta = rope_theta
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, **settings)
        self.modulation = modulation(width, 6, **settings)
        heads: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.projections = Projections(width, **heads, **settings)
        self.mlp = MLP(width, mlp_width, **settings)

    def modulated(self, c: Float[Array, "B D"]) -> list[Float[Array, "B 1 D"]]:
        """Shift, scale and gate of the attention, then of the MLP."""
        return jnp.split(self.modulation(jax.nn.silu(c))[:, None], 6, axis=-1)

    def heads(
        self, x: Float[Array, "B L D"], parts: list[Array], places: Array | None, adapter: Adapter | None = None
    ) -> Stream:
        shift, scale = parts[:2]
        x = modulate(self.norm(x), shift, scale)
        query, key, value = self.projections.split(x)
        if adapter is not None:
            query = query + adapter.query(x).reshape(query.shape)
            key = key + adapter.key(x).reshape(key.shape)
            value = value + adapter.value(x).reshape(value.shape)
        query, key = rms_normalise(query), rms_normalise(key)
        if places is not None:
            query, key = (apply_rotary_axes(a, places[None], theta=self.rope_theta) for a in (query, key))
        return Stream(query, key, value)

    def finish(
        self,
        x: Float[Array, "B L D"],
        read: Float[Array, "B L N V"],
        parts: list[Array],
        adapter: Adapter | None = None,
    ) -> Float[Array, "B L D"]:
        """The residual stream after the attention's output projection and the MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = parts
        merged = self.projections.merge(read)
        if adapter is not None:
            merged = merged + adapter.out(read.reshape(*read.shape[:2], -1))
        x = x + (1 + gate) * merged
        return x + (1 + mlp_gate) * self.mlp(modulate(self.norm(x), mlp_shift, mlp_scale))

    def flops(self, tokens: int) -> float:
        return self.projections.flops(tokens) + self.mlp.flops(tokens)


class DiTBlock(nnx.Module):
    """A layer of `jattn.models.DiT`.

    Args:
      width, num_heads, num_kv_heads, head_dim, mlp_width, rope_theta: of the text's and the image's `StreamLayer`.
      spatial, subjects: how many kinds of each there are; each kind has an adapter.
      lora_rank: of the adapters.
      attention: "pka", or "full": every token attends to all, the conditions' too. It is there to be compared with.
      options: of `pka_attention`.
    """

    def __init__(
        self,
        width: int,
        *,
        spatial: int,
        subjects: int,
        lora_rank: int,
        attention: Attention = "pka",
        options: dict[str, Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **layer: Any,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        checks.check_choice("attention", attention, ("pka", "full"))
        self.attention = attention
        self.options = tuple((options or {}).items())
        self.text = StreamLayer(width, **layer, **settings)
        self.image = StreamLayer(width, **layer, **settings)
        p = self.image.projections
        self.spatial = nnx.List([Adapter(p, lora_rank, **settings) for _ in range(spatial)])
        self.subjects = nnx.List([Adapter(p, lora_rank, **settings) for _ in range(subjects)])

    def __call__(
        self,
        x: Tokens,
        *,
        time: Float[Array, "B D"],
        clean: Float[Array, "B D"],
        places: Places,
        kinds: Kinds,
        keywords: tuple[Keywords, ...],
        mask: Bool[Array, "B J L"] | None,
        cache: KeyValues | None = None,
    ) -> tuple[Tokens, Bool[Array, "B J L"]]:
        """The layer's output, and the mask for the next denoising step.

        Args:
          x: hidden states; with a cache only those of text and image.
          time, clean: embeddings of t and of 0.
          places, kinds, keywords: of the conditions in `x`, or in the cache.
          mask: from the denoising step before.
          cache: what `conditions` gave.
        """
        words, picture, still = self.text.modulated(time), self.image.modulated(time), self.image.modulated(clean)
        text, image = self.text.heads(x.text, words, None), self.image.heads(x.image, picture, places.image)
        if cache is None:
            spatial, subjects = self._condition_heads(x.spatial, x.subjects, still, places, kinds)
        else:
            spatial, subjects = ([Stream(None, *pair) for pair in group] for group in cache)
        streams = Streams(
            text,
            image,
            tuple(spatial),
            tuple(Subject(s.query, s.key, s.value, *named) for s, named in zip(subjects, keywords, strict=True)),
        )
        if self.attention == "pka":
            read, mask = pka_attention(streams, mask, **dict(self.options))
        else:
            read = _full(streams)
            mask = jnp.ones((x.image.shape[0], len(keywords), x.image.shape[1]), bool)
        after = Tokens(
            self.text.finish(x.text, read.text, words),
            self.image.finish(x.image, read.image, picture),
            *(() if cache is not None else self._finish_conditions(x.spatial, x.subjects, read[2:], still, kinds)),
        )
        return after, mask

    def conditions(
        self,
        spatial: tuple[Array, ...],
        subjects: tuple[Array, ...],
        *,
        clean: Float[Array, "B D"],
        places: Places,
        kinds: Kinds,
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], KeyValues]:
        """The conditions after the layer, and their keys and values in it, without text and image."""
        still = self.image.modulated(clean)
        groups = self._condition_heads(spatial, subjects, still, places, kinds)
        read = tuple(tuple(dot_product_attention(*stream) for stream in group) for group in groups)
        keys = KeyValues(*(tuple((stream.key, stream.value) for stream in group) for group in groups))
        return *self._finish_conditions(spatial, subjects, read, still, kinds), keys

    def _condition_heads(self, spatial: Any, subjects: Any, still: Any, places: Places, kinds: Kinds) -> Any:
        def heads(group: Any, at: Any, adapters: Any, which: tuple[int, ...]) -> list[Stream]:
            return [self.image.heads(x, still, here, adapters[i]) for x, here, i in zip(group, at, which, strict=True)]

        return (
            heads(spatial, places.spatial, self.spatial, kinds.spatial),
            heads(subjects, places.subjects, self.subjects, kinds.subjects),
        )

    def _finish_conditions(self, spatial: Any, subjects: Any, read: Any, still: Any, kinds: Kinds) -> Any:
        def finish(group: Any, out: Any, adapters: Any, which: tuple[int, ...]) -> tuple[Array, ...]:
            return tuple(self.image.finish(x, y, still, adapters[i]) for x, y, i in zip(group, out, which, strict=True))

        return (
            finish(spatial, read[0], self.spatial, kinds.spatial),
            finish(subjects, read[1], self.subjects, kinds.subjects),
        )


def modulation(width: int, parts: int, **settings: Any) -> nnx.Linear:
    """`parts` numbers per channel from a time embedding, zero at the start."""
    return nnx.Linear(width, parts * width, kernel_init=nnx.initializers.zeros, **settings)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    return (1 + scale) * x + shift


def _full(streams: Streams) -> Outputs:
    """Every token attends to the tokens of all streams."""
    groups: Any = (streams.text, streams.image, *streams.spatial, *streams.subjects)
    joined = [jnp.concatenate([stream[i] for stream in groups], axis=1) for i in range(3)]
    ends = [sum(stream.key.shape[1] for stream in groups[: i + 1]) for i in range(len(groups) - 1)]
    parts = jnp.split(dot_product_attention(*joined), ends, axis=1)
    first = 2 + len(streams.spatial)
    return Outputs(parts[0], parts[1], tuple(parts[2:first]), tuple(parts[first:]))
