"""The catalog: an `Entry` for every variant the library has, in three static tuples.

`CATALOG` has what takes queries, keys and values, `WEIGHTED` what cannot do without weights of its own beside these,
`RECURRENCES` the token mixers that take neither.

The layer registry, the language model's `pattern`, the property tests, the documentation table and the comparison
harness all read it. Nothing here imports an op: entries name them, and names load on first use.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import runpy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from jattn.masks import Causal, SlidingWindow

Feature = Literal[
    "bias", "mask", "grouped_heads", "value_dim", "cross", "lse", "segments", "state", "decay", "channel_decay",
    "feature_map", "sinks", "soft_cap",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attention variant.

    Attributes:
      name: the word that names it in a `pattern`, on a command line and in the tests.
      op: where the function is, as "module:name".
      layer: where the mixer is, likewise, or `None` for an op that is no token mixer.
      step: where the one-token form is, or `None`.
      summary: one line for tables.
      paper: where it is defined.
      cost: time per head in terms of T, S (lengths), H, V (head dims), F (features), C (chunk), W (window) and
        b (block).
      causality: whether the op "is" causal always, or "may" be by an argument.
      features: what the op accepts or returns beyond query, key and value.
      example: options that make a small, meaningful call; the property tests use them.
      golden: the stem of its golden file, or `None`.
    """

    name: str
    op: str
    summary: str
    paper: str
    cost: str
    causality: Literal["is", "may"]
    features: frozenset[Feature]
    layer: str | None = None
    step: str | None = None
    example: Mapping[str, Any] = MappingProxyType({})
    golden: str | None = None

    def load_op(self) -> Callable[..., Any]:
        return load(self.op)

    def load_layer(self) -> Callable[..., Any]:
        if self.layer is None:
            mixers = ", ".join(entry.name for entry in EVERYTHING if entry.layer)
            raise ValueError(f"{self.name}: is an op without a layer; the mixers are {mixers}")
        return load(self.layer)


@functools.lru_cache
def load(reference: str) -> Any:
    """The object that "module:name" or "path/to/file.py:name" names, the same one every time.

    Raises:
      ValueError: there is no such module, file or name.
    """
    source, _, name = reference.rpartition(":")
    try:
        if not source.endswith(".py"):
            return getattr(importlib.import_module(source), name)
        return runpy.run_path(source)[name]
    except (ImportError, FileNotFoundError, AttributeError, KeyError, ValueError) as error:
        wanted = '"module:name" or "path/to/file.py:name"'
        raise ValueError(f"{reference!r}: expected {wanted} of something that is there ({error})") from error


CATALOG: tuple[Entry, ...] = (
    Entry(
        name="softmax",
        op="jattn.dot_product:dot_product_attention",
        layer="jattn.nn.softmax:SoftmaxMixer",
        summary="softmax attention over any mask",
        paper="Vaswani et al. 2017, eq. 1",
        cost="T S (H + V)",
        causality="may",
        features=frozenset(
            {"bias", "mask", "grouped_heads", "value_dim", "cross", "lse", "segments", "sinks", "soft_cap"}
        ),
    ),
    Entry(
        name="sliding_window",
        op="jattn.sparse.sliding_window:sliding_window_attention",
        layer="jattn.nn.softmax:SlidingWindowMixer",
        summary="softmax attention over the nearest keys",
        paper="Beltagy et al. 2020, section 3.1",
        cost="T W (H + V)",
        causality="may",
        features=frozenset({"grouped_heads", "value_dim", "cross", "lse", "segments", "sinks", "soft_cap"}),
        example=MappingProxyType({"window": 5}),
    ),
    Entry(
        name="block_sparse",
        op="jattn.sparse.block_sparse:block_sparse_attention",
        layer="jattn.nn.block_sparse:BlockSparseMixer",
        summary="softmax attention over listed blocks, under any mask and score function",
        paper="Dong et al. 2024, section 3",
        cost="pairs of blocks x block size (H + V)",
        causality="may",
        features=frozenset({"grouped_heads", "value_dim", "cross", "lse", "segments", "sinks", "soft_cap"}),
        example=MappingProxyType({"block_mask": Causal() & SlidingWindow(4)}),
        golden="block_sparse",
    ),
    Entry(
        name="power",
        op="jattn.sparse.power:power_attention",
        summary="softmax attention over nearby blocks and those a power of two away",
        paper="Chen et al. 2025, section 3",
        cost="T b log(S / b) (H + V)",
        causality="is",
        features=frozenset({"grouped_heads", "value_dim", "cross", "lse", "segments"}),
        example=MappingProxyType({"block_size": 2, "window_blocks": 1, "sink_blocks": 0}),
    ),
    Entry(
        name="hyper",
        op="jattn.sparse.hyper:hyper_attention",
        summary="softmax attention within blocks of sorted, alike vectors, and sampled beyond",
        paper="Han et al. 2023, algorithms 1 to 4",
        cost="T (b + m) (H + V), with m samples; causal: log T times that",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "cross", "lse"}),
        example=MappingProxyType({"rng": 0, "block_size": 16, "sample_size": 8, "min_seq_len": 4}),
        golden="hyper_attention",
    ),
    Entry(
        name="psa",
        op="jattn.sparse.psa:pyramid_sparse_attention",
        summary="softmax attention that reads blocks of keys whole, as means of 2, 4 or 8 tokens, or not at all",
        paper="Li et al. 2025, section 3",
        cost="T S (H + V) times the mean of 1 / level, and T S H / w to choose levels, with a stride of w",
        causality="may",
        features=frozenset({"grouped_heads", "value_dim", "cross", "lse"}),
        example=MappingProxyType({"block_q": 128, "block_kv": 128}),
        golden="psa",
    ),
    Entry(
        name="kronecker",
        op="jattn.sparse.kronecker:kronecker_attention",
        layer="jattn.nn.kronecker:KroneckerMixer",
        summary="one softmax over pairs of keys (triples, ...), for relations that no two tokens have alone",
        paper="Alman and Song 2023, definition 1.2",
        cost="T S^2 (H + V) for pairs",
        causality="may",
        features=frozenset({"grouped_heads", "value_dim", "cross", "lse", "segments"}),
    ),
    Entry(
        name="neighborhood_1d",
        op="jattn.neighborhood.neighborhood:na1d",
        layer="jattn.nn.neighborhood_mixer:NeighborhoodMixer",
        summary="softmax attention over a window of W keys that is moved inward at the ends, with strides and dilation",
        paper="Hassani et al. 2024, section 2",
        cost="T W (H + V)",
        causality="may",
        features=frozenset({"grouped_heads", "value_dim", "lse"}),
        example=MappingProxyType({"kernel_size": 5, "stride": 2, "dilation": 2}),
        golden="neighborhood_attention",
    ),
    Entry(
        name="linear",
        op="jattn.linear.recurrence:linear_attention",
        layer="jattn.nn.linear:LinearMixer",
        step="jattn.linear.recurrence:linear_attention_step",
        summary="linear attention with constant, per-token or per-channel decay",
        paper="Katharopoulos et al. 2020, eq. 9; Yang et al. 2024, eq. 3",
        cost="T (C (H + V) + H V)",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
        golden="gla",
    ),
    Entry(
        name="lightning",
        op="jattn.linear.lightning:lightning_attention",
        layer="jattn.nn.linear:LightningMixer",
        step="jattn.linear.lightning:lightning_attention_step",
        summary="linear attention with a fixed decay per head",
        paper="Qin et al. 2024, algorithm 1",
        cost="T (C (H + V) + H V)",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state"}),
        golden="lightning_attention2",
    ),
    Entry(
        name="retnet",
        op="jattn.linear.retention:retention",
        layer="jattn.nn.gated:RetNetMixer",
        step="jattn.linear.retention:retention_step",
        summary="linear attention with decays per head that are powers of two away from 1",
        paper="Sun et al. 2023, eq. 5",
        cost="T (C (H + V) + H V)",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state"}),
    ),
    Entry(
        name="simple_gla",
        op="jattn.linear.gated:simple_gla",
        layer="jattn.nn.gated:SimpleGLAMixer",
        step="jattn.linear.gated:simple_gla_step",
        summary="linear attention with a decay per token and head (Mamba-2's recurrence)",
        paper="Dao and Gu 2024, eq. 16",
        cost="T (C (H + V) + H V)",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
        golden="gla",
    ),
    Entry(
        name="mamba2",
        op="jattn.linear.gated:simple_gla",
        layer="jattn.nn.mamba2:Mamba2Mixer",
        step="jattn.linear.gated:simple_gla_step",
        summary="Mamba-2's block: a time step that both writes and forgets, a skip, a gated norm",
        paper="Dao and Gu 2024, section 7",
        cost="T (C (H + V) + H V)",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
    ),
    Entry(
        name="hgrn2",
        op="jattn.linear.recurrence:linear_attention",
        layer="jattn.nn.gated:HGRN2Mixer",
        step="jattn.linear.recurrence:linear_attention_step",
        summary="linear attention that writes as much as it forgets, key = 1 - decay per channel",
        paper="Qin et al. 2024, eq. 8",
        cost="T (C (H + V) + H V)",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
    ),
    Entry(
        name="hedgehog",
        op="jattn.linear.hedgehog:hedgehog_attention",
        layer="jattn.nn.hedgehog:HedgehogMixer",
        step="jattn.linear.hedgehog:hedgehog_attention_step",
        summary="linear attention over learnt features that mimic softmax",
        paper="Zhang et al. 2024, eq. 3",
        cost="T (H F + C (F + V) + F V)",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "feature_map"}),
        golden="hedgehog",
    ),
    Entry(
        name="linear_transformer",
        op="jattn.linear.recurrence:linear_attention",
        layer="jattn.nn.dsf:LinearTransformerMixer",
        step="jattn.linear.recurrence:linear_attention_step",
        summary="linear attention over the features elu + 1, divided by its summed weights",
        paper="Katharopoulos et al. 2020, eq. 7 and 9",
        cost="T (C (H + V) + H V)",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
        golden="dsf",
    ),
    Entry(
        name="normalized_attention",
        op="jattn.linear.recurrence:linear_attention",
        layer="jattn.nn.dsf:NormalizedMixer",
        step="jattn.linear.recurrence:linear_attention_step",
        summary="linear attention divided by a number read off the token",
        paper="Sieber et al. 2024, section 4",
        cost="T (C (H + V) + H V)",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
        golden="dsf",
    ),
    Entry(
        name="delta_rule",
        op="jattn.linear.delta_rule:delta_rule",
        layer="jattn.nn.delta:DeltaNetMixer",
        step="jattn.linear.delta_rule:delta_rule_step",
        summary="linear attention that overwrites what it holds under a key, with any decay or none",
        paper="Schlag et al. 2021, eq. 24; Yang et al. 2024, section 3",
        cost="T (C (C + H + V) + H (H + V))",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
        golden="gated_delta_rule",
    ),
    Entry(
        name="gated_delta_rule",
        op="jattn.linear.gated:gated_delta_rule",
        layer="jattn.nn.delta:GatedDeltaNetMixer",
        step="jattn.linear.delta_rule:delta_rule_step",
        summary="the delta rule with a decay per token and head",
        paper="Yang et al. 2025, eq. 10",
        cost="T (C (C + H + V) + H (H + V))",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay"}),
        golden="gated_delta_rule",
    ),
    Entry(
        name="kda",
        op="jattn.linear.gated:kda",
        layer="jattn.nn.delta:KDAMixer",
        step="jattn.linear.delta_rule:delta_rule_step",
        summary="the delta rule with a decay per token and key channel",
        paper="Kimi Linear 2025, eq. 1",
        cost="T (C (C + H + V) + H (H + V))",
        causality="is",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments", "state", "decay", "channel_decay"}),
        golden="gated_delta_rule",
    ),
)

WEIGHTED: tuple[Entry, ...] = (
    Entry(
        name="sea",
        op="jattn.linear.sea:sea_attention",
        layer="jattn.nn.sea:SEAMixer",
        step="jattn.linear.sea_decode:sea_step",
        summary="softmax attention over the k keys that a linear-cost estimate of it singles out",
        paper="Lee et al. 2024, section 3",
        cost="T (C (F + H + V) + F (H + V) + N L + k (H + V))",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "segments"}),
        example=MappingProxyType({"k_budget": 3}),
        golden="sea",
    ),
    Entry(
        name="routing",
        op="jattn.sparse.routing:routing_attention",
        summary="softmax attention within clusters of the tokens nearest to means that k-means learns",
        paper="Roy et al. 2020, algorithm 1",
        cost="T (C H + w (H + V)), with C clusters of w = T / C tokens",
        causality="may",
        features=frozenset({"mask", "grouped_heads", "value_dim", "cross"}),
        # A layer exists, jattn.nn.RoutingMixer, but decoding is not its parallel form: no mixer of the catalog.
        example=MappingProxyType({"variant": "lucid", "window_size": 5}),
        golden="routing_transformer",
    ),
)
"""Ops with an argument `params` or `means`; costs have N heads, L cells and k keys."""

RECURRENCES: tuple[Entry, ...] = (
    Entry(
        name="s6",
        op="jattn.linear.selective_scan:selective_scan",
        layer="jattn.nn.dsf_recurrent:S6Mixer",
        step="jattn.linear.selective_scan:selective_scan_step",
        summary="the selective scan of Mamba: n states for every channel, a time step per token and channel",
        paper="Gu and Dao 2023, algorithm 2",
        cost="T n",
        causality="is",
        features=frozenset({"segments", "state"}),
        golden="dsf",
    ),
    Entry(
        name="ssd",
        op="jattn.linear.selective_scan:selective_scan",
        layer="jattn.nn.dsf_recurrent:SSDMixer",
        step="jattn.linear.selective_scan:selective_scan_step",
        summary="the selective scan with one rate for all channels and states",
        paper="Sieber et al. 2024, section 4",
        cost="T n",
        causality="is",
        features=frozenset({"segments", "state"}),
        golden="dsf",
    ),
    Entry(
        name="lru",
        op="jattn.linear.dsf:dsf_scan",
        layer="jattn.nn.dsf_recurrent:LRUMixer",
        summary="the linear recurrent unit: complex decays that tokens do not change",
        paper="Orvieto et al. 2023, eq. 7",
        cost="T",
        causality="is",
        features=frozenset({"segments", "state"}),
    ),
    Entry(
        name="qlstm",
        op="jattn.linear.dsf:dsf_scan",
        layer="jattn.nn.dsf_recurrent:QLSTMMixer",
        summary="an LSTM's cell whose gates see the input and not the state",
        paper="Sieber et al. 2024, section 4",
        cost="T",
        causality="is",
        features=frozenset({"segments", "state"}),
        golden="dsf",
    ),
    Entry(
        name="qlstm_reversed",
        op="jattn.linear.dsf:dsf_scan",
        layer="jattn.nn.dsf_recurrent:ReversedQLSTMMixer",
        summary="the same, forgetting as S6 does: sigmoid(-f) to a learned power",
        paper="Sieber et al. 2024, section 4",
        cost="T",
        causality="is",
        features=frozenset({"segments", "state"}),
        golden="dsf",
    ),
    Entry(
        name="rglru",
        op="jattn.linear.dsf:dsf_scan",
        layer="jattn.nn.dsf_recurrent:RGLRUMixer",
        summary="Griffin's recurrent block: a real-gated linear recurrent unit behind a short convolution",
        paper="De et al. 2024, eq. 1 to 4",
        cost="T",
        causality="is",
        features=frozenset({"segments", "state"}),
        golden="dsf",
    ),
)
"""Mixers whose op takes no queries, keys and values; costs are per channel of n states."""

EVERYTHING: tuple[Entry, ...] = (*CATALOG, *WEIGHTED, *RECURRENCES)


def get(name: str) -> Entry:
    """The entry called `name`; an unknown name raises `ValueError` with the nearest ones."""
    for entry in EVERYTHING:
        if entry.name == name:
            return entry
    names = [entry.name for entry in EVERYTHING]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"no attention variant is called {name!r}{hint} The catalog has {', '.join(names)}")
