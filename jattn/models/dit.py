"""A diffusion transformer that several conditions steer: velocity(x_t, t; text, spatial conditions, subjects).

Images are cut into patches; text comes as the features of an encoder. The layers are `jattn.nn.DiTBlock`s with
position-aligned, keyword-scoped attention (`jattn.pka_attention`). Conditions depend on neither x_t nor t there, so
`cache_conditions` makes their keys and values once, for all steps of `sample`. Each layer keeps a mask for every
subject, made at one denoising step and used at the next.

The paper (Zhou et al. 2026) adapts a FLUX model and has no public code. Ours: the sizes, rotary positions in two
dimensions, subjects placed left of the image, a mask for each layer, and that conditions are embedded as images are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.models.flow_matching import euler_sample
from jattn.nn.dit_block import DiTBlock, KeyValues, Keywords, Kinds, Places, Tokens, modulate, modulation
from jattn.sparse.pka import pka_pairs


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the model's parameters and its function.

    Attributes:
      channels: of images and conditions.
      patch: side of a patch in pixels.
      text_width: features of a text token.
      spatial, subjects: how many kinds of conditions there are, each with an adapter of its own. A call may leave any
        of them out.
      width, num_layers, num_heads, num_kv_heads, head_dim, mlp_width: D, even; depth, N, K, H; K defaults to N, H to
        D / N, which is a multiple of 4.
      lora_rank: of the conditions' adapters.
      attention: "pka", or "full" attention among all tokens to compare with, which cannot be cached.
      combine, eps, normalization, max_tokens: as in `jattn.pka_attention`.
      rope_theta: base of the rotary wavelengths.
      dtype, param_dtype: of the computation and of the master weights.
    """

    channels: int = 4
    patch: int = 2
    text_width: int = 64
    spatial: int = 1
    subjects: int = 1
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int = 512
    lora_rank: int = 8
    attention: Literal["pka", "full"] = "pka"
    combine: Literal["add", "joint"] = "add"
    eps: float = 0.2
    normalization: Literal["minmax", "softmax"] = "minmax"
    max_tokens: int | None = None
    rope_theta: float = 10_000.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("channels", "patch", "text_width", "width", "num_layers", "num_heads", "mlp_width", "lora_rank"):
            checks.check_count(name, getattr(self, name))
        for name in ("spatial", "subjects"):
            checks.check_count(name, getattr(self, name), minimum=0)
        checks.check_choice("attention", self.attention, ("pka", "full"))
        checks.check_choice("combine", self.combine, ("add", "joint"))
        checks.check_choice("normalization", self.normalization, ("minmax", "softmax"))
        head_dim = self.width / self.num_heads if self.head_dim is None else self.head_dim
        if head_dim % 4:
            raise ValueError(
                f"head_dim: rows and columns turn pairs of channels, so a multiple of 4 is needed, got {head_dim:g}"
            )
        if self.width % 2:
            raise ValueError(f"width: a time has as many sines as cosines, so it is even, got {self.width}")


class SubjectImage(NamedTuple):
    """A reference image and the positions of the text tokens that name what it shows; see `jattn.keyword_mask`."""

    image: Float[Array, "B h w C"]
    keyword_ids: Int[Array, "B W"] | None = None
    keyword_valid: Bool[Array, "B W"] | None = None


class Conditions(NamedTuple):
    """What steers an image beside text: one for each kind, `None` for one that is absent, `()` for none at all."""

    spatial: tuple[Float[Array, "B H W C"] | None, ...] = ()
    subjects: tuple[SubjectImage | None, ...] = ()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "keywords"],
    meta_fields=["kinds", "grids"],
)
@dataclasses.dataclass(frozen=True)
class ConditionCache:
    """Keys and values of the conditions in every layer; made by `DiT.cache_conditions`.

    Attributes:
      keys: `[layers, B, S, K, H]` of each.
      keywords: of the subjects.
      kinds: which adapters they went through.
      grids: rows and columns of patches of the spatial conditions.
    """

    keys: KeyValues
    keywords: tuple[Keywords, ...]
    kinds: Kinds
    grids: tuple[tuple[int, int], ...]


class _Embedded(NamedTuple):
    """The conditions of a call as tokens, with all that is known of them beside."""

    spatial: tuple[Array, ...]
    subjects: tuple[Array, ...]
    places: Places
    kinds: Kinds
    keywords: tuple[Keywords, ...]
    grids: tuple[tuple[int, int], ...]


class DiT(nnx.Module):
    """The model that `config` describes. It starts as velocity = 0, for the last layer starts at zero."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        settings: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs
        }  # fmt: skip
        width, pixels = config.width, config.patch**2 * config.channels
        self.patch_in = nnx.Linear(pixels, width, **settings)
        self.text_in = nnx.Linear(config.text_width, width, **settings)
        self.time_in = nnx.Linear(width, width, **settings)
        self.time_out = nnx.Linear(width, width, **settings)

        def layer(key: Array) -> DiTBlock:
            names = (
                "num_heads", "num_kv_heads", "head_dim", "mlp_width", "rope_theta",
                "spatial", "subjects", "lora_rank", "attention",
            )  # fmt: skip
            options = {name: getattr(config, name) for name in ("combine", "eps", "normalization", "max_tokens")}
            return DiTBlock(
                width,
                options=options,
                **{name: getattr(config, name) for name in names},
                **(settings | {"rngs": nnx.Rngs(params=key)}),
            )

        self.layers = nnx.vmap(layer)(jax.random.split(rngs.params(), config.num_layers))
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, **settings)
        self.modulation = modulation(width, 2, **settings)
        self.head = nnx.Linear(width, pixels, kernel_init=nnx.initializers.zeros, **settings)

    def __call__(
        self,
        image: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        text: Float[Array, "B M F"],
        conditions: Conditions | ConditionCache | None = None,
        *,
        masks: Bool[Array, "layers B J L"] | None = None,
    ) -> tuple[Float[Array, "B H W C"], Bool[Array, "layers B J L"]]:
        """The velocity, and the masks for the next denoising step.

        Args:
          image: x_t. H and W are multiples of `patch`.
          t: time, 1 for pure noise.
          text: features of the prompt.
          conditions: as images, or from `cache_conditions`, which gives the same without making them again.
          masks: what this call returned at the step before, for the J subjects that are present. `None` at the first
            step and in training: every image token sees every subject.

        Returns:
          `(velocity, masks)`, the velocity in float32 or wider.

        Raises:
          ValueError, TypeError: a wrong shape or dtype; a spatial condition that is not of the image's size.
        """
        sizes = checks.bind_shapes(
            ("image", image, "B H W C"), ("t", t, "B"), ("text", text, "B M F"),
            C=self.config.channels, F=self.config.text_width,
        )  # fmt: skip
        checks.check_floating(image=image, t=t, text=text)
        tokens, grid = self._patches("image", image)
        keys = None
        if isinstance(conditions, ConditionCache):
            self._check_cacheable()
            keys = conditions.keys
            given = _Embedded((), (), Places(None, (), ()), conditions.kinds, conditions.keywords, conditions.grids)
        else:
            given = self._embed(conditions, sizes["B"])
        for i, other in zip(given.kinds.spatial, given.grids, strict=True):
            if other != grid:
                raise ValueError(
                    f"conditions.spatial[{i}]: {other} patches, and the image has {grid}; resize it to the image's size"
                )
        if masks is not None:
            names = {"A": self.config.num_layers, "B": sizes["B"], "J": len(given.keywords), "L": grid[0] * grid[1]}
            checks.bind_shapes(("masks", masks, "A B J L"), **names)
        time, clean = self._times(t), self._times(jnp.zeros_like(t))
        x = Tokens(self.text_in(text.astype(self._dtype)), tokens, given.spatial, given.subjects)
        places = given.places._replace(image=_grid_places(grid, 0))
        graph, parameters = nnx.split(self.layers)

        def layer(x: Tokens, slice_: Any) -> tuple[Tokens, Array]:
            weights, mask, keys = slice_
            block = nnx.merge(graph, weights)
            return block(
                x, time=time, clean=clean, places=places, kinds=given.kinds, keywords=given.keywords, mask=mask,
                cache=keys,
            )  # fmt: skip

        x, next_masks = jax.lax.scan(layer, x, (parameters, masks, keys))
        shift, scale = jnp.split(self.modulation(jax.nn.silu(time))[:, None], 2, axis=-1)
        out = self.head(modulate(self.norm(x.image), shift, scale))
        return self._unpatch(out.astype(checks.accumulator_dtype(out.dtype)), grid), next_masks

    def cache_conditions(self, conditions: Conditions) -> ConditionCache:
        """The conditions' keys and values in every layer, to be given to all calls in their place.

        Raises:
          ValueError, TypeError: a wrong shape or dtype; attention "full", under which they depend on the image.
        """
        self._check_cacheable()
        if not isinstance(conditions, Conditions):
            raise TypeError(f"conditions: expected jattn.models.Conditions, got {type(conditions).__name__}")
        given = self._embed(conditions, None)
        arrays = (*given.spatial, *given.subjects)
        if not arrays:
            return ConditionCache(KeyValues((), ()), (), Kinds(), ())
        clean = self._times(jnp.zeros(arrays[0].shape[:1]))
        graph, parameters = nnx.split(self.layers)

        def layer(x: Any, weights: Any) -> Any:
            *x, keys = nnx.merge(graph, weights).conditions(*x, clean=clean, places=given.places, kinds=given.kinds)
            return tuple(x), keys

        _, keys = jax.lax.scan(layer, (given.spatial, given.subjects), parameters)
        return ConditionCache(keys, given.keywords, given.kinds, given.grids)

    def sample(
        self,
        noise: Float[Array, "B H W C"],
        text: Float[Array, "B M F"],
        conditions: Conditions | None = None,
        *,
        steps: int = 28,
    ) -> Float[Array, "B H W C"]:
        """An image from noise by `steps` Euler steps, with the conditions made once and masks handed on."""
        given: Any = Conditions() if conditions is None else conditions
        if self.config.attention == "pka":
            given = self.cache_conditions(given)
        count = sum(subject is not None for subject in conditions.subjects) if conditions is not None else 0
        length = math.prod(noise.shape[1:3]) // self.config.patch**2
        first = jnp.ones((self.config.num_layers, noise.shape[0], count, length), bool)
        # At the first step all see all, as without masks.
        image, _ = euler_sample(
            lambda x, t, masks: self(x, t, text, given, masks=masks), noise, steps=steps, carry=first
        )
        return image

    def flops(
        self,
        batch: int,
        *,
        text: int,
        image: int,
        spatial: int | None = None,
        subjects: Sequence[int] = (),
        selected: Sequence[int] | None = None,
        cached: bool = False,
    ) -> float:
        """Multiply-adds times two of a call; the time's embedding and modulation left out.

        Args:
          batch: rows.
          text, image: tokens of text and patches of the image.
          spatial: how many spatial conditions are there; `None` is all kinds.
          subjects: patches of each subject that is there.
          selected, cached: as in `jattn.sparse.pka.pka_pairs`.
        """
        config, block = self.config, self.layers
        spatial = config.spatial if spatial is None else spatial
        lengths = [*itertools.repeat(image, spatial), *subjects]
        p = block.image.projections
        total = block.text.flops(batch * text) + block.image.flops(batch * image)
        if config.attention == "full":
            pairs = (text + image + sum(lengths)) ** 2
        else:
            pairs = pka_pairs(
                text=text, image=image, spatial=spatial, subjects=subjects, selected=selected, cached=cached
            )
        if not cached:
            features = config.width + p.num_heads * p.head_dim, config.width + p.num_kv_heads * p.head_dim
            low_rank = 4.0 * config.lora_rank * sum(features)
            total += sum(block.image.flops(batch * length) + batch * length * low_rank for length in lengths)
        total += 2.0 * batch * pairs * p.num_heads * (p.head_dim + p.value_dim)
        pixels = config.patch**2 * config.channels
        patches = image if cached else image + sum(lengths)
        ends = config.text_width * text + pixels * (patches + image)
        return config.num_layers * total + 2.0 * batch * config.width * ends

    def _check_cacheable(self) -> None:
        if self.config.attention == "full":
            raise ValueError("conditions: under full attention they depend on the image, so there is no cache")

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.dtype)

    def _times(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        """Sines and cosines of 1000 t at wavelengths up to 2 pi 10^4, through a small network."""
        half = self.config.width // 2
        acc = checks.accumulator_dtype(self._dtype)
        rates = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=acc) / half)
        angles = 1000 * t.astype(acc)[:, None] * rates
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(self._dtype)
        return self.time_out(jax.nn.silu(self.time_in(waves)))

    def _patches(self, name: str, image: Array) -> tuple[Float[Array, "B L D"], tuple[int, int]]:
        """The tokens of an image and its rows and columns of patches."""
        patch = self.config.patch
        batch, height, width, channels = image.shape
        if 0 in image.shape or height % patch or width % patch:
            raise ValueError(f"{name}: height and width must be multiples of the patch {patch}, got {height} x {width}")
        rows, columns = height // patch, width // patch
        x = image.astype(self._dtype).reshape(batch, rows, patch, columns, patch, channels)
        x = jnp.swapaxes(x, 2, 3).reshape(batch, rows * columns, -1)
        return self.patch_in(x), (rows, columns)

    def _unpatch(self, x: Array, grid: tuple[int, int]) -> Float[Array, "B H W C"]:
        patch = self.config.patch
        x = jnp.swapaxes(x.reshape(x.shape[0], *grid, patch, patch, -1), 2, 3)
        return x.reshape(x.shape[0], grid[0] * patch, grid[1] * patch, -1)

    def _embed(self, conditions: Conditions | None, batch: int | None) -> _Embedded:
        if conditions is None:
            conditions = Conditions()
        if not isinstance(conditions, Conditions):
            raise TypeError(
                f"conditions: expected Conditions, a ConditionCache or None, got {type(conditions).__name__}"
            )
        known = {"C": self.config.channels} | ({} if batch is None else {"B": batch})
        kinds, tokens, grids, keywords = [], [], [], []
        for name, count in (("spatial", self.config.spatial), ("subjects", self.config.subjects)):
            group = getattr(conditions, name)
            if len(group) not in (0, count):
                raise ValueError(f"conditions.{name}: expected {count}, None for one that is absent, got {len(group)}")
            present = [(i, x) for i, x in enumerate(group) if x is not None]
            found = []
            for i, image in present:
                where = f"conditions.{name}[{i}]"
                if name == "subjects":
                    if not isinstance(image, SubjectImage):
                        raise TypeError(f"{where}: expected a SubjectImage, got {type(image).__name__}")
                    keywords.append(Keywords(image.keyword_ids, image.keyword_valid))
                    image, where = image.image, f"{where}.image"
                known["B"] = checks.bind_shapes((where, image, "B H W C"), **known)["B"]
                checks.check_floating(**{where: image})
                found.append(self._patches(where, image))
            kinds.append(tuple(i for i, _ in present))
            tokens.append(tuple(x for x, _ in found))
            grids.append(tuple(grid for _, grid in found))
        # Subjects stand in a row to the left of the image, so no place is taken twice, whatever the image's size.
        starts = [-sum(columns for _, columns in grids[1][: i + 1]) for i in range(len(grids[1]))]
        places = Places(
            None,
            tuple(_grid_places(grid, 0) for grid in grids[0]),
            tuple(_grid_places(grid, start) for grid, start in zip(grids[1], starts, strict=True)),
        )
        return _Embedded(tokens[0], tokens[1], places, Kinds(*kinds), tuple(keywords), grids[0])


def _grid_places(grid: tuple[int, int], first_column: int) -> Int[Array, "L 2"]:
    """Row and column of every patch, row by row."""
    rows, columns = jnp.meshgrid(jnp.arange(grid[0]), first_column + jnp.arange(grid[1]), indexing="ij")
    return jnp.stack([rows.ravel(), columns.ravel()], axis=-1)
