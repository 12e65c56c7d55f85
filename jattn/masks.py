"""Who may attend to whom, as a symbolic and hashable expression over positions.

A mask is a predicate `M(t, s)` on query position `t` and key position `s`. Leaves are combined with `&`, `|` and `~`:

>>> Causal() & SlidingWindow(1024) | Sink(4)
Causal() & SlidingWindow(1024) | Sink(4)

Four readings of one expression feed everything else:

* `elem(t, s)`: the predicate itself, on NumPy or JAX integers (kernels, references);
* `classify(t0, t1, s0, s1)`: is the rectangle `[t0, t1] x [s0, s1]` empty (0), partial (1) or full (2)? Exact for
  leaves. `&` is the minimum, `|` the maximum and `~` is `2 - kind`: never wrong, at worst a needless "partial";
* `block_lists(...)`: the pairs of blocks a kernel must visit, from `classify` alone; no `T x S` array is ever built;
* `interval(t)`: where the keys of every query are neighbors, the first of them and the one after the last.

Masks compare by value and may key a cache. They hold static numbers only; data such as document ids goes through the
`segment_ids` of an op, an arbitrary array through its `mask`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int8, Int32

from jattn.checks import check_count
from jattn.mask_picture import picture, svg

EMPTY, PARTIAL, FULL = 0, 1, 2
_FAR = 2**62  # beyond every position
FARTHEST = 2**30
"""The largest number that a mask may have: positions are integers of 32 bits, and so is their sum with it."""


class Interval(NamedTuple):
    """Of keys, for each of the queries that were asked about: `low <= s < high`."""

    low: Int[np.ndarray, ...]
    high: Int[np.ndarray, ...]


class Mask:
    """A predicate on (query position, key position); see the module. Subclasses are frozen dataclasses."""

    def __init_subclass__(cls) -> None:
        # A pytree without leaves: a mask may be an argument of a jitted function and becomes part of its cache key.
        jax.tree_util.register_static(cls)

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        """The predicate on integer arrays.

        Args:
          q_pos, kv_pos: signed integers or NumPy or JAX arrays of them, broadcast against each other.
          head: the query head(s), broadcast likewise; only an `Fn` reads it.

        Returns:
          A boolean array of the broadcast shape.
        """
        raise NotImplementedError

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> Int8[np.ndarray, ...]:
        """0 (empty), 1 (partial) or 2 (full) for rectangles with inclusive bounds, elementwise over NumPy integers."""
        raise NotImplementedError

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval | None:
        """The keys `low <= s < high` that each query sees, if they are that for all queries; else `None`.

        A query that sees nothing has `high <= low`.
        """
        return None

    def dense(self, q_len: int, kv_len: int, head: int | None = None) -> Bool[np.ndarray, "T S"]:
        """The whole mask for positions from 0; for tests and small inputs."""
        return np.asarray(self.elem(np.arange(q_len)[:, None], np.arange(kv_len)[None, :], head), dtype=bool)

    def block_kinds(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Int8[np.ndarray, "nq nk"]:
        """The kind of every pair of blocks.

        Ragged last blocks are classified by the positions they have: a kernel whose tile reaches beyond the sequence
        tests the range itself.
        """
        q_lo, q_hi = _bounds("q_len", q_len, "block_q", block_q)
        kv_lo, kv_hi = _bounds("kv_len", kv_len, "block_kv", block_kv)
        kinds = self.classify(q_lo[:, None], q_hi[:, None], kv_lo[None, :], kv_hi[None, :])
        return np.broadcast_to(kinds, (len(q_lo), len(kv_lo)))

    def block_lists(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> BlockLists:
        """The work lists over pairs of blocks, built in O(nq nk) and cached on all arguments."""
        return _block_lists(self, q_len, kv_len, block_q, block_kv)

    def show(self, q_len: int = 32, kv_len: int | None = None) -> None:
        """Print `picture(self, q_len, kv_len)`: a row for each query and a column for each key."""
        print(picture(self, q_len, kv_len))

    def _repr_svg_(self) -> str:
        return svg(self)

    def __and__(self, other: Mask) -> Mask:
        return _combine(And, self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return _combine(Or, self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("mask: a mask has no truth value; combine masks with &, | and ~ instead of and, or and not")

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Full(Mask):
    """Everyone sees everyone."""

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return 0 * q_pos == 0 * kv_pos

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return np.full(np.broadcast_shapes(np.shape(q_lo), np.shape(kv_lo)), FULL, np.int8)

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        return Interval(np.full_like(q_pos, -_FAR), np.full_like(q_pos, _FAR))

    def __invert__(self) -> Mask:
        return Empty()


@dataclasses.dataclass(frozen=True, repr=False)
class Empty(Mask):
    """No one sees anyone."""

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return 0 * q_pos != 0 * kv_pos

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return np.full(np.broadcast_shapes(np.shape(q_lo), np.shape(kv_lo)), EMPTY, np.int8)

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        return Interval(np.zeros_like(q_pos), np.zeros_like(q_pos))

    def __invert__(self) -> Mask:
        return Full()


@dataclasses.dataclass(frozen=True, repr=False)
class Causal(Mask):
    """`s <= t + offset`: keys up to the query's own position, shifted by `offset` (negative: strictly earlier ones)."""

    offset: int = 0

    def __post_init__(self) -> None:
        _check("offset", self.offset, minimum=-(2**31))

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return kv_pos <= q_pos + self.offset

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return _kind(some=kv_lo <= q_hi + self.offset, every=kv_hi <= q_lo + self.offset)

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        return Interval(np.full_like(q_pos, -_FAR), q_pos + self.offset + 1)


@dataclasses.dataclass(frozen=True, repr=False)
class SlidingWindow(Mask):
    """`t - left <= s <= t + right`: `left` earlier keys, the query's own, `right` later ones.

    This is the reading of `local_window_size` in `jax.nn.dot_product_attention`. A window of the `W` most recent keys
    with the query's own among them (Mistral, Hugging Face) is `SlidingWindow(W - 1)`.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        _check("left", self.left, minimum=0)
        _check("right", self.right, minimum=0)

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return (kv_pos >= q_pos - self.left) & (kv_pos <= q_pos + self.right)

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        nearest, farthest = q_lo - kv_hi, q_hi - kv_lo
        return _kind(
            some=(nearest <= self.left) & (farthest >= -self.right),
            every=(farthest <= self.left) & (nearest >= -self.right),
        )

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        return Interval(q_pos - self.left, q_pos + self.right + 1)


@dataclasses.dataclass(frozen=True, repr=False)
class Sink(Mask):
    """`s < n`: the first `n` keys, for every query.

    Read as attention sinks (StreamingLLM) in `Causal() & (SlidingWindow(w) | Sink(n))`, and as the bidirectional prefix
    of a prefix language model in `Causal() | Prefix(n)`: `Prefix` is another name of this class.
    """

    n: int

    def __post_init__(self) -> None:
        _check("n", self.n, minimum=0)

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return kv_pos < self.n + 0 * q_pos  # the product gives it the shape of both

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return _kind(some=kv_lo < self.n + 0 * q_lo, every=kv_hi < self.n + 0 * q_lo)

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        return Interval(np.full_like(q_pos, -_FAR), np.full_like(q_pos, self.n))


Prefix = Sink


@dataclasses.dataclass(frozen=True, repr=False)
class Chunked(Mask):
    """`t // size == s // size`: both in the same chunk (the local layers of Llama 4)."""

    size: int

    def __post_init__(self) -> None:
        _check("size", self.size)

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return q_pos // self.size == kv_pos // self.size

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        first = np.maximum(q_lo // self.size, kv_lo // self.size)
        last = np.minimum(q_hi // self.size, kv_hi // self.size)
        one_chunk = (q_lo // self.size == q_hi // self.size) & (kv_lo // self.size == kv_hi // self.size)
        return _kind(some=first <= last, every=(first == last) & one_chunk)

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        return Interval(q_pos // self.size * self.size, (q_pos // self.size + 1) * self.size)


@dataclasses.dataclass(frozen=True, repr=False)
class Stride(Mask):
    """`(t - s) mod k == phase`: every `k`-th key, counted from the query (strided attention, Child et al. 2019)."""

    k: int
    phase: int = 0

    def __post_init__(self) -> None:
        _check("k", self.k)
        if _check("phase", self.phase, minimum=0) >= self.k:
            raise ValueError(f"phase: expected less than k = {self.k}, got {self.phase}")

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return (q_pos - kv_pos) % self.k == self.phase

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        # The distances in a rectangle are all integers from `nearest` to `farthest`.
        nearest, farthest = q_lo - kv_hi - self.phase, q_hi - kv_lo - self.phase
        some = farthest // self.k * self.k >= nearest
        return _kind(some=some, every=some & ((nearest == farthest) | (self.k == 1)))


@dataclasses.dataclass(frozen=True, repr=False)
class PowerOfTwo(Mask):
    """The distance `(t + offset) // block - s // block` is 0 or a power of two (PowerAttention, Chen et al. 2025).

    Distances are between blocks (section 3 there). The query's own block is seen whole, so a causal model adds
    `Causal() & ...`.
    """

    block: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        _check("block", self.block)
        _check("offset", self.offset, minimum=-(2**31))

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        distance = (q_pos + self.offset) // self.block - kv_pos // self.block
        return (distance >= 0) & (distance & (distance - 1) == 0)

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        nearest = (q_lo + self.offset) // self.block - kv_hi // self.block
        farthest = (q_hi + self.offset) // self.block - kv_lo // self.block
        top = 2 ** (np.frexp(np.maximum(farthest, 1))[1].astype(np.int64) - 1)  # the last power up to `farthest`
        alone = (nearest == farthest) & (nearest & (nearest - 1) == 0)
        return _kind(
            some=(farthest >= 0) & ((nearest <= 0) | (top >= nearest)),
            every=(nearest >= 0) & ((farthest <= 2) | alone),
        )


@dataclasses.dataclass(frozen=True, repr=False)
class NearBlocks(Mask):
    """`0 <= (t + offset) // block - s // block < count`: the query's own block and the `count - 1` before it.

    These are seen whole, so a causal model adds `Causal() & ...`.
    """

    block: int
    count: int
    offset: int = 0

    def __post_init__(self) -> None:
        _check("block", self.block)
        _check("count", self.count)
        _check("offset", self.offset, minimum=-(2**31))

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        distance = (q_pos + self.offset) // self.block - kv_pos // self.block
        return (distance >= 0) & (distance < self.count)

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        nearest = (q_lo + self.offset) // self.block - kv_hi // self.block
        farthest = (q_hi + self.offset) // self.block - kv_lo // self.block
        return _kind(
            some=(farthest >= 0) & (nearest < self.count),
            every=(nearest >= 0) & (farthest < self.count),
        )

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval:
        high = ((q_pos + self.offset) // self.block + 1) * self.block
        return Interval(high - self.count * self.block, high)


@dataclasses.dataclass(frozen=True, repr=False)
class Fn(Mask):
    """Any predicate `function(q_pos, kv_pos, head) -> bool` of integer arrays that broadcast; all blocks are partial.

    `key` stands for the function in comparisons and caches: two masks with equal keys are taken to be the same. The
    function may close over static numbers only, never over traced arrays.
    """

    function: Callable[[Any, Any, Any], Any] = dataclasses.field(compare=False)
    key: Hashable

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function: expected a callable (q_pos, kv_pos, head), got {type(self.function).__name__}")
        if not isinstance(self.key, Hashable):
            raise TypeError(f"key: expected a hashable value, got {type(self.key).__name__}")

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        seen = self.function(q_pos, kv_pos, head)
        dtype = jax.dtypes.result_type(seen)
        if dtype != np.bool_:  # of an integer, & would read the last bit
            raise TypeError(f"function: expected booleans, got {dtype}; compare, and combine with &, | and ~")
        return seen & Full().elem(q_pos, kv_pos)

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return np.full(np.broadcast_shapes(np.shape(q_lo), np.shape(kv_lo)), PARTIAL, np.int8)

    def __repr__(self) -> str:
        return f"Fn({getattr(self.function, '__name__', '...')}, key={self.key!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class And(Mask):
    """All of `terms`; written `a & b`, which flattens and simplifies."""

    terms: tuple[Mask, ...]

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return functools.reduce(lambda a, b: a & b, (term.elem(q_pos, kv_pos, head) for term in self.terms))

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return functools.reduce(np.minimum, (term.classify(q_lo, q_hi, kv_lo, kv_hi) for term in self.terms))

    def interval(self, q_pos: Int[np.ndarray, ...]) -> Interval | None:
        found = [each for each in (term.interval(q_pos) for term in self.terms) if each is not None]
        if len(found) < len(self.terms):
            return None
        return Interval(np.max([each.low for each in found], axis=0), np.min([each.high for each in found], axis=0))

    def __repr__(self) -> str:
        return " & ".join(f"({term!r})" if isinstance(term, Or) else repr(term) for term in self.terms)


@dataclasses.dataclass(frozen=True, repr=False)
class Or(Mask):
    """Any of `terms`; written `a | b`, which flattens and simplifies."""

    terms: tuple[Mask, ...]

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return functools.reduce(lambda a, b: a | b, (term.elem(q_pos, kv_pos, head) for term in self.terms))

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return functools.reduce(np.maximum, (term.classify(q_lo, q_hi, kv_lo, kv_hi) for term in self.terms))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.terms))


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Mask):
    """The complement of `term`; written `~a`."""

    term: Mask

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return self.term.elem(q_pos, kv_pos, head) ^ True

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return FULL - self.term.classify(q_lo, q_hi, kv_lo, kv_hi)

    def __invert__(self) -> Mask:
        return self.term

    def __repr__(self) -> str:
        return f"~({self.term!r})" if isinstance(self.term, (And, Or)) else f"~{self.term!r}"


class WorkList(NamedTuple):
    """Steps over pairs of blocks. A row (or column) without blocks owns one step of kind 0, so that it is written."""

    row: Int32[np.ndarray, " A"]
    col: Int32[np.ndarray, " A"]
    kind: Int8[np.ndarray, " A"]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """The pairs of blocks that a mask lists, in the two orders that a kernel walks. The arrays are read-only.

    Attributes:
      kinds: 0, 1 or 2 for every pair.
      by_row: query block by query block, key blocks ascending (forward, gradient of the queries).
      by_col: key block by key block, query blocks ascending (gradient of keys and values).
    """

    kinds: Int8[np.ndarray, "nq nk"]
    by_row: WorkList
    by_col: WorkList

    @property
    def counts(self) -> Int[np.ndarray, " nq"]:
        """How many key blocks each query block visits."""
        return np.count_nonzero(self.kinds, axis=1)

    @property
    def density(self) -> float:
        """Visited pairs over all pairs."""
        return np.count_nonzero(self.kinds) / self.kinds.size

    @property
    def num_steps(self) -> int:
        """The length of `by_row`: the sum over query blocks of `max(1, count)`."""
        return len(self.by_row.row)


@functools.lru_cache(maxsize=512)
def _block_lists(mask: Mask, q_len: int, kv_len: int, block_q: int, block_kv: int) -> BlockLists:
    kinds = mask.block_kinds(q_len, kv_len, block_q, block_kv)
    by_row = _work_list(kinds)
    by_col = _work_list(kinds.T)
    for array in (kinds, *by_row, *by_col):
        array.flags.writeable = False
    return BlockLists(kinds=kinds, by_row=by_row, by_col=WorkList(row=by_col.col, col=by_col.row, kind=by_col.kind))


def _work_list(kinds: np.ndarray) -> WorkList:
    listed = kinds != EMPTY
    listed[~listed.any(axis=1), 0] = True
    row, col = np.nonzero(listed)
    return WorkList(row.astype(np.int32), col.astype(np.int32), kinds[row, col])


def _check(name: str, value: Any, *, minimum: int = 1) -> int:
    return check_count(name, value, minimum=minimum, maximum=FARTHEST)


def _bounds(length_name: str, length: int, block_name: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of every block."""
    check_count(length_name, length)
    check_count(block_name, block)
    first = np.arange(0, length, block)
    return first, np.minimum(first + block, length) - 1


def _kind(*, some: Any, every: Any) -> np.ndarray:
    """`every` implies `some`."""
    return np.asarray(some, np.int8) + np.asarray(every, np.int8)


def _combine(operator: type[And] | type[Or], *masks: Mask) -> Mask:
    """Flatten, drop repeats and the neutral element, and let the absorbing element absorb."""
    neutral, absorbing = (Full(), Empty()) if operator is And else (Empty(), Full())
    terms: dict[Mask, None] = {}
    for mask in masks:
        terms.update(dict.fromkeys(mask.terms if isinstance(mask, operator) else (mask,)))
    if absorbing in terms:
        return absorbing
    terms.pop(neutral, None)
    return operator(tuple(terms)) if len(terms) > 1 else next(iter(terms), neutral)
