"""The Routing Transformer's layer: heads that attend by content, beside heads that look at the nearest tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.nn.softmax import KVCache, SlidingWindowMixer
from jattn.sparse.kmeans import KMeansState, kmeans_init, kmeans_update
from jattn.sparse.routing import routing_attention
from jattn.sparse.routing_clusters import RoutingAux
from jattn.sparse.routing_decode import RoutingCache, init_routing_cache, routing_step


class RoutingState(nnx.Variable):
    """What k-means keeps: no parameter, so no gradient reaches it and no optimiser moves it."""


class RoutingMixerState(NamedTuple):
    """The caches of both kinds of heads; `local` is `None` where all heads route."""

    routed: RoutingCache
    local: KVCache | None


class RoutingMixer(nnx.Module):
    """Causal attention of which some heads route and the others slide a window (Roy et al. 2020).

    Routed heads are `routing_attention` of "google" with shared queries and keys, so they have no key projection, and
    no positions: they find tokens by content. (The released code adds learnt vectors by the distance of ranks.) The
    others are a `SlidingWindowMixer` with rotary positions. Means move when `update_means` is called and not before.

    Training and decoding differ, as in the released code. A call without a state routes all tokens of a row together,
    so a token's clusters depend on later ones; no output depends on a later value. A call with a state routes each
    token among those up to it, and gives the same however the sequence is cut. The two agree where `window_size` holds
    the whole sequence. That is why this layer is not a mixer of the catalog, whose decoding is its parallel form.

    Args:
      width, num_heads, num_kv_heads, head_dim, use_bias, dtype, param_dtype, layer_index, num_layers: as in
        `SoftmaxMixer`; `num_kv_heads` counts values of routed heads and keys and values of the others.
      num_clusters: C.
      window_size: w, how many tokens a cluster takes; T / C is usual.
      routed_heads: how many heads route, half of them if `None`; a multiple of the heads that share a value head.
      window: how many tokens a local head sees.
      commitment: the factor of the loss that pulls queries to their means.
      decay: of the means.
      init_count: 1 counts the means at the start as a token each; 0 is the released code, see `kmeans_init`.
      qk_norm, rope_theta: of the local heads.

    State: `RoutingMixerState`; queries, values and scores for `capacity` tokens, and a ring of `window`.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_clusters: int = 8,
        window_size: int = 512,
        routed_heads: int | None = None,
        window: int = 128,
        commitment: float = 1e-4,
        decay: float = 0.999,
        init_count: int = 1,
        use_bias: bool = False,
        qk_norm: bool = True,
        rope_theta: float | None = 10_000.0,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del layer_index, num_layers
        checks.check_count("width", width)
        checks.check_count("num_heads", num_heads)
        if head_dim is None and width % num_heads:
            raise ValueError(
                f"num_heads: a width of {width} does not divide by {num_heads} heads; "
                "choose a divisor of the width, or give head_dim"
            )
        self.head_dim = width // num_heads if head_dim is None else head_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.check_grouped_heads(num_heads, num_kv_heads)
        shared = num_heads // num_kv_heads
        routed_heads = num_heads // 2 // shared * shared if routed_heads is None else routed_heads
        self.routed_heads = checks.check_count("routed_heads", routed_heads)
        if self.routed_heads > num_heads or self.routed_heads % shared:
            raise ValueError(
                f"routed_heads: expected at most {num_heads} and a multiple of the {shared} heads that share a value "
                f"head, got {routed_heads}"
            )
        self.routed_kv_heads = self.routed_heads // shared
        self.window_size = checks.check_count("window_size", window_size)
        self.commitment, self.decay = commitment, decay
        options: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = nnx.Linear(width, self.routed_heads * self.head_dim, **options)
        self.value = nnx.Linear(width, self.routed_kv_heads * self.head_dim, **options)
        # As the output projection of every mixer: a new layer passes its input through unchanged.
        out_options = {**options, "kernel_init": nnx.initializers.zeros}
        self.out = nnx.Linear(self.routed_heads * self.head_dim, width, **out_options)
        state = kmeans_init(rngs.params(), self.routed_heads, num_clusters, self.head_dim, init_count=init_count)
        self.means, self.counts, self.totals = (RoutingState(x) for x in state)
        options |= {"head_dim": self.head_dim, "window": window, "qk_norm": qk_norm, "rope_theta": rope_theta}
        options |= {"num_heads": num_heads - self.routed_heads, "num_kv_heads": num_kv_heads - self.routed_kv_heads}
        self.local = SlidingWindowMixer(width, **options) if self.routed_heads < num_heads else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: RoutingMixerState | None = None,
    ) -> tuple[Float[Array, "B T D"], RoutingMixerState | None]:
        if segment_ids is not None:
            raise ValueError("segment_ids: clusters are of a whole row; give every document a row of its own")
        if state is None:
            return self.with_aux(x, positions=positions)[0], None
        out, cache = self._decode(x, state.routed)
        y, local = self._project(out), None
        if self.local is not None:
            near, local = self.local(x, positions=positions, state=state.local)
            y = y + near
        return y, RoutingMixerState(cache, local)

    def with_aux(
        self, x: Float[Array, "B T D"], *, positions: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RoutingAux]:
        """The parallel form and what it has beside the output: add `aux.loss` to the loss of a model.

        Args:
          mask: True for real tokens. It keeps the others out of clusters and of the loss, and out of reach of local
            heads.
        """
        query, value = self._heads(x)
        out, aux = routing_attention(
            query,
            None,
            value,
            self.means[...],
            window_size=self.window_size,
            is_causal=True,
            share_qk=True,
            mask=None if mask is None else mask[:, None, None],
            commitment=self.commitment,
            return_aux=True,
        )
        y = self._project(out)
        if self.local is not None:
            segments = None if mask is None else mask.astype(jnp.int32)
            y = y + self.local(x, positions=positions, segment_ids=segments)[0]
        return y, aux

    def kmeans_state(self) -> KMeansState:
        """The means and what they are averages of."""
        return KMeansState(self.means[...], self.counts[...], self.totals[...])

    def updated_means(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> KMeansState:
        """The k-means state after the tokens of a batch; the layer stays as it is. Arguments as in `kmeans_update`."""
        query, _ = self._heads(x)
        return kmeans_update(self.kmeans_state(), query, decay=self.decay, mask=mask, axis_name=axis_name)

    def set_means(self, state: KMeansState) -> None:
        """Route by `state` from now on."""
        for variable, x in zip((self.means, self.counts, self.totals), state, strict=True):
            variable[...] = x

    def update_means(self, x: Float[Array, "B T D"], **options: Any) -> None:
        """`updated_means`, and keep it: once per training step, under `nnx.jit` or not."""
        self.set_means(self.updated_means(x, **options))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> RoutingMixerState:
        sizes = {"num_kv_heads": self.routed_kv_heads, "value_dim": self.head_dim}
        cache = init_routing_cache(self.means[...], batch, capacity, dtype=dtype, **sizes)
        return RoutingMixerState(cache, None if self.local is None else self.local.init_state(batch, capacity, dtype))

    def flops(self, batch: int, length: int) -> float:
        tokens = batch * length
        linear = sum(layer.in_features * layer.out_features for layer in (self.query, self.value, self.out))
        clusters, window = self.means.shape[1], min(self.window_size, length)
        # Scores of every token; then half of the pairs within each cluster, each with a key and a value.
        routed = self.routed_heads * self.head_dim * clusters * (2.0 * tokens + 2.0 * batch * window**2)
        return 2.0 * tokens * linear + routed + (0.0 if self.local is None else self.local.flops(batch, length))

    def _heads(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
        query = self.query(x).reshape(*x.shape[:-1], self.routed_heads, self.head_dim)
        return query, self.value(x).reshape(*x.shape[:-1], self.routed_kv_heads, self.head_dim)

    def _project(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.out(out.reshape(*out.shape[:-2], -1))

    def _decode(self, x: Float[Array, "B T D"], cache: RoutingCache) -> tuple[Array, RoutingCache]:
        """Tokens one after the other, since each is routed among those before it."""
        query, value = (jnp.swapaxes(part, 0, 1) for part in self._heads(x))
        means = self.means[...]

        def step(cache: RoutingCache, token: tuple[Array, Array]) -> tuple[RoutingCache, Array]:
            out, cache = routing_step(*token, means, cache, window_size=self.window_size)
            return cache, out

        cache, outs = jax.lax.scan(step, cache, (query, value))
        return jnp.swapaxes(outs, 0, 1), cache
