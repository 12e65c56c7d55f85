"""Which pairs of blocks attention visits, as lists: what block-sparse kernels walk.

Queries are cut into nq = ceil(T / block_q) blocks and keys into nk = ceil(S / block_kv). A pair (i, j) has a kind:

    0 empty:   not visited
    1 partial: visited, and M(t, s) is asked for every t in i, s in j
    2 full:    visited, and every t in i may attend to every s in j; a block that reaches beyond T or S is never full

so that query t sees key s exactly if kind(t // block_q, s // block_kv) = 2, or if it is 1 and M(t, s) holds. M is a
symbolic mask over positions or, where there is none, a bank of the boolean blocks themselves.

A list may be shared or belong to one batch row or head: arrays begin with Bm in {1, B} and Nm in {1, K, N}. Made from
NumPy arrays and symbolic masks, a `BlockMask` holds NumPy arrays and is static: its work lists have no step too many.
Made from JAX arrays it is dynamic: one compilation serves every selection of the same width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int8, Int32

from jattn.checks import bind_shapes, check_array, check_count, check_integer, check_values
from jattn.mask_picture import SVG_CELLS, TEXT_CELLS, coarse, draw_svg, draw_text
from jattn.masks import EMPTY, FULL, PARTIAL, And, Fn, Full, Mask, Not, Or
from jattn.sparse.block_lists import (
    AnyArray,
    Lists,
    blocks_of_array,
    blocks_of_rows,
    compact,
    id_ranges,
    kinds_of,
    make_lists,
    namespace,
    spread,
)


class Steps(NamedTuple):
    """The pairs of blocks in the order in which a kernel visits them.

    Attributes:
      row, col: the blocks of queries and of keys.
      kind: 0 is a step that only makes sure that its row (or column) is written.
      bank: where in `BlockMask.bank` the elements of a partial pair are; `None` without a bank.
    """

    row: Int32[AnyArray, "Bm Nm A"]
    col: Int32[AnyArray, "Bm Nm A"]
    kind: Int32[AnyArray, "Bm Nm A"]
    bank: Int32[AnyArray, "Bm Nm A"] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kv_idx", "n_partial", "n_total", "q_idx", "qn_partial", "qn_total", "bank", "kv_bank", "q_bank"),
    meta_fields=("q_len", "kv_len", "block_q", "block_kv", "mask"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BlockMask:
    """Lists of blocks, a frozen pytree; build it with one of the `from_` constructors.

    Attributes:
      q_len, kv_len, block_q, block_kv: T, S and the sizes of the blocks.
      mask: the element rule of partial blocks, or `None` where the bank has it.
      kv_idx: the key blocks of each query block: partial ones ascending, full ones ascending, then the last one again.
      n_partial, n_total: how many entries are partial, and how many are listed.
      q_idx, qn_partial, qn_total: the same pairs as lists of the query blocks of each key block.
      bank: boolean blocks; the first one is all true.
      kv_bank, q_bank: for each entry of the lists, which block of the bank is its element rule.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    mask: Mask | None
    kv_idx: Int32[AnyArray, "Bm Nm nq W"]
    n_partial: Int32[AnyArray, "Bm Nm nq"]
    n_total: Int32[AnyArray, "Bm Nm nq"]
    q_idx: Int32[AnyArray, "Bm Nm nk Wt"]
    qn_partial: Int32[AnyArray, "Bm Nm nk"]
    qn_total: Int32[AnyArray, "Bm Nm nk"]
    bank: Bool[AnyArray, "P block_q block_kv"] | None = None
    kv_bank: Int32[AnyArray, "Bm Nm nq W"] | None = None
    q_bank: Int32[AnyArray, "Bm Nm nk Wt"] | None = None

    @classmethod
    def from_expr(cls, mask: Mask, q_len: int, kv_len: int, block_q: int = 128, block_kv: int = 128) -> BlockMask:
        """The blocks of a symbolic mask, from its `classify` alone: O(nq nk) time and memory, cached by value.

        Raises:
          TypeError: not a mask, a mask whose `Fn` holds a traced array; ValueError: a length or block below 1.
        """
        if not isinstance(mask, Mask):
            raise TypeError(
                f"mask: expected a jattn.masks.Mask, got {type(mask).__name__}; for a predicate see create_block_mask, "
                f"for a boolean array BlockMask.from_dense"
            )
        check_static("mask", mask)
        return _from_expr(mask, q_len, kv_len, block_q, block_kv)

    @classmethod
    def from_map(
        cls,
        kind: Int[AnyArray, "#Bm #Nm nq nk"],
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        mask: Mask | None = None,
        bank: Bool[AnyArray, "P block_q block_kv"] | None = None,
        bank_ids: Int[AnyArray, "#Bm #Nm nq nk"] | None = None,
        max_blocks: int | None = None,
        max_q_blocks: int | None = None,
    ) -> BlockMask:
        """The blocks whose kinds are given: 0, 1 or 2, NumPy for a static mask and JAX for a dynamic one.

        Args:
          kind: `[nq, nk]`, or with a batch axis and a head axis before it. 2 promises that every pair of the block is
            allowed; a block that reaches beyond the lengths becomes partial by itself.
          mask: the element rule of partial blocks; `None` without a bank allows every pair of them.
          bank, bank_ids: another element rule: the pairs of block (i, j) are `bank[bank_ids[..., i, j]]`.
          max_blocks, max_q_blocks: the widths of the lists; `None` is the longest list of a static mask, and for a
            dynamic one nk and nq. A dynamic mask must not list more; a list is cut off there.

        Raises:
          ValueError, TypeError: a wrong shape, dtype or kind; a bank beside a mask or without ids; a static list that
            is longer than its width.
        """
        nq, nk = _counts(q_len, kv_len, block_q, block_kv)
        kind = _four_axes("kind", kind, nq, nk)
        if kind.dtype == np.bool_:
            raise TypeError(
                "kind: expected 0, 1 or 2, got booleans; kind.astype(np.int8) lists the true ones as partial"
            )
        check_integer(kind=kind)
        check_values("kind", kind, lambda x: (x < EMPTY) | (x > FULL), "expected 0 (empty), 1 (partial) or 2 (full)")
        if (bank is None) != (bank_ids is None) or not (bank is None or mask is None):
            raise ValueError("bank: expected bank and bank_ids without a mask, or neither of them")
        if mask is None and bank is None:
            mask = Full()
        elif mask is not None:
            check_static("mask", mask)
        xp = namespace(kind, bank, bank_ids)
        ids = None
        if bank is not None:
            bind_shapes(("bank", bank, "P block_q block_kv"), block_q=block_q, block_kv=block_kv)
            ids = _four_axes("bank_ids", bank_ids, nq, nk)
            check_integer(bank_ids=ids)
            bank = xp.concatenate([np.ones((1, block_q, block_kv), bool), bank])
            ids = xp.where(kind == PARTIAL, ids + 1, 0).astype(np.int32)
            kind, ids = xp.broadcast_arrays(kind, ids)
        whole = (np.arange(1, nq + 1) * block_q <= q_len)[:, None] & (np.arange(1, nk + 1) * block_kv <= kv_len)
        kind = xp.where(whole, kind, xp.minimum(kind, PARTIAL)).astype(np.int8)

        def transposed(x: Any) -> Any:
            return None if x is None else xp.swapaxes(x, -1, -2)

        by_row = make_lists(kind, xp.arange(nk), ids, _width("max_blocks", max_blocks, kind))
        by_col = make_lists(
            transposed(kind), xp.arange(nq), transposed(ids), _width("max_q_blocks", max_q_blocks, transposed(kind))
        )
        return _assembled(q_len, kv_len, block_q, block_kv, mask, bank, by_row, by_col)

    @classmethod
    def from_indices(
        cls,
        idx: Int[AnyArray, "#Bm #Nm nq k"],
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        num: Int[AnyArray, "#Bm #Nm nq"] | None = None,
        mask: Mask | None = None,
    ) -> BlockMask:
        """The key blocks that are chosen for each query block, such as a top-k selection; k may be less than nk.

        Args:
          idx: `[nq, k]`, or with a batch axis and a head axis before it, in any order.
          num: how many of the k slots hold a choice, the first ones; the rest are not read. `None` is all.
          mask: what is seen in a chosen block; `None` is all of it. A block that it leaves empty is not listed.

        Raises:
          ValueError, TypeError: a wrong shape or dtype; a block that does not exist or is chosen twice. While `idx` is
            traced its values are not known: then repeats count once and blocks that do not exist are left out.
        """
        nq, nk = _counts(q_len, kv_len, block_q, block_kv)
        idx = _four_axes("idx", idx, nq, None)
        width = idx.shape[-1]
        check_integer(idx=idx)
        xp = namespace(idx, num)
        chosen: Any = np.ones((1, 1, nq, width), bool)
        if num is not None:
            check_array("num", num)
            check_integer(num=num)
            chosen = np.arange(width) < _four_axes("num", num[..., None], nq, 1)
            check_values("num", num, lambda x: (x < 0) | (x > width), f"expected 0 to {width}, the slots of idx")
        if not isinstance(chosen, jax.core.Tracer):
            check_values(
                "idx", idx, lambda x: chosen & ((x < 0) | (x >= nk)),
                f"expected blocks 0 to {nk - 1}, of {block_kv} keys each; num= says how many slots hold a choice",
            )  # fmt: skip
            check_values(
                "idx", idx, lambda x: _repeats(xp.where(chosen, x, -1 - np.arange(width))),
                "a block is chosen twice for the same query block and would count twice; keep one of them, and let "
                "num= say how many slots hold a choice",
            )  # fmt: skip
        chosen = chosen & (idx >= 0) & (idx < nk)
        idx, chosen = xp.broadcast_arrays(idx, chosen)
        kind = listed_kinds(spread(idx, chosen, nk), mask, q_len, kv_len, block_q, block_kv)
        return cls.from_map(
            kind, q_len, kv_len, block_q, block_kv, mask=mask, max_blocks=None if xp is np else min(width, nk)
        )

    @classmethod
    def from_dense(cls, mask: Bool[AnyArray, "#Bm #Nm T S"], block_q: int = 128, block_kv: int = 128) -> BlockMask:
        """The blocks of a boolean array, for tests and small inputs: its partial blocks are stored in a bank.

        NumPy gives a static mask that stores each distinct block once, JAX a dynamic one that stores all blocks.

        Raises:
          ValueError, TypeError: not a boolean array of 2 to 4 axes.
        """
        check_array("mask", mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"mask: expected booleans (True may attend), got {mask.dtype}; pass mask.astype(bool)")
        mask = _four_axes("mask", mask, None, None)
        q_len, kv_len = mask.shape[2:]
        _counts(q_len, kv_len, block_q, block_kv)
        kind: Any
        bank: Any
        ids: Any
        if isinstance(mask, np.ndarray):
            kind, bank, ids = blocks_of_rows(lambda b, h, rows: mask[b, h, rows], mask.shape, (block_q, block_kv))
        else:
            kind, bank, ids = blocks_of_array(mask, (block_q, block_kv))
        return cls.from_map(kind, q_len, kv_len, block_q, block_kv, bank=bank, bank_ids=ids)

    def refine_segments(self, q_segments: Int[AnyArray, "B T"], kv_segments: Int[AnyArray, "B S"]) -> BlockMask:
        """The lists of each batch row without the pairs of blocks that have no segment in common.

        A pair stays when the ranges of ids of its two blocks meet, and stays full when both are of one id. The ids may
        be in any order. The element rule `q_segments[t] == kv_segments[s]` is not part of the result: pass the ids to
        the op too.

        Raises:
          ValueError, TypeError: a wrong shape or dtype, or lists for another number of batch rows.
        """
        known = {} if self.kv_idx.shape[0] == 1 else {"B": self.kv_idx.shape[0]}
        bind_shapes(
            ("q_segments", q_segments, "B T"), ("kv_segments", kv_segments, "B S"), T=self.q_len, S=self.kv_len, **known
        )
        check_integer(q_segments=q_segments, kv_segments=kv_segments)
        xp = namespace(self.kv_idx, q_segments, kv_segments)
        queries = id_ranges(q_segments, self.block_q, xp)
        keys = id_ranges(kv_segments, self.block_kv, xp)

        def refined(own: Any, other: Any, idx: Any, n_partial: Any, n_total: Any, bank: Any) -> Lists:
            kind = kinds_of(idx, n_partial, n_total)
            low, high = (xp.take_along_axis(x[:, None, None, :], idx, axis=-1) for x in other)
            own_low, own_high = (x[:, None, :, None] for x in own)
            alike = (own_low == own_high) & (low == high) & (own_low == low)
            kind = xp.where(alike, kind, xp.minimum(kind, PARTIAL))
            kind = xp.where((own_low <= high) & (low <= own_high), kind, EMPTY)
            return make_lists(kind, idx, bank, _width("", None, kind))

        by_row = refined(queries, keys, self.kv_idx, self.n_partial, self.n_total, self.kv_bank)
        by_col = refined(keys, queries, self.q_idx, self.qn_partial, self.qn_total, self.q_bank)
        return _assembled(self.q_len, self.kv_len, self.block_q, self.block_kv, self.mask, self.bank, by_row, by_col)

    @property
    def is_static(self) -> bool:
        """Whether the lists are NumPy arrays."""
        return isinstance(self.kv_idx, np.ndarray)

    @property
    def num_steps(self) -> int:
        """The length of `work_list()`."""
        if not self.is_static:
            return self.kv_idx.shape[-2] * self.kv_idx.shape[-1]
        return int(np.maximum(self.n_total, 1).sum(axis=-1).max())

    @property
    def density(self) -> Any:
        """Listed pairs over all pairs of blocks; a number, or an array for a dynamic mask."""
        pairs = math.prod(self.n_total.shape) * self.q_idx.shape[-2]
        return float(self.n_total.sum() / pairs) if self.is_static else self.n_total.sum() / pairs

    def work_list(self, transposed: bool = False) -> Steps:
        """The steps sorted by row (or by column), partial pairs before full ones; each row owns one step at least.

        A static list has exactly max over (Bm, Nm) of sum over rows of max(1, pairs) steps; a shorter one repeats its
        last step with kind 0. A dynamic list has nq W steps (or nk Wt).
        """
        if transposed:
            idx, n_partial, n_total, bank = self.q_idx, self.qn_partial, self.qn_total, self.q_bank
        else:
            idx, n_partial, n_total, bank = self.kv_idx, self.n_partial, self.n_total, self.kv_bank
        xp = namespace(idx)
        slot = np.arange(idx.shape[-1])
        owner = xp.broadcast_to(np.arange(idx.shape[-2], dtype=np.int32)[:, None], idx.shape)
        kind = kinds_of(idx, n_partial, n_total)
        owner, idx, kind, kept = (
            x.reshape(*x.shape[:2], -1) for x in (owner, idx, kind, slot < xp.maximum(n_total, 1)[..., None])
        )
        bank = None if bank is None else bank.reshape(idx.shape)
        if self.is_static:
            count, (owner, idx, kind, bank) = compact(kept, owner, idx, kind, bank)
            kind = np.where(np.arange(kind.shape[-1]) < count[..., None], kind, EMPTY)
        row, col = (idx, owner) if transposed else (owner, idx)
        return Steps(row, col, kind, bank)

    def to_map(self) -> Int8[AnyArray, "Bm Nm nq nk"]:
        """The kind of every pair of blocks."""
        kind = kinds_of(self.kv_idx, self.n_partial, self.n_total)
        return spread(self.kv_idx, kind, self.q_idx.shape[-2]).astype(np.int8)

    def to_dense(self, num_heads: int | None = None) -> Bool[AnyArray, "Bm N T S"]:
        """Who sees whom, pair by pair; for tests and small inputs.

        Args:
          num_heads: the number N of query heads to write it out for, a multiple of Nm; `None` keeps Nm. An `Fn` that
            reads its head needs it.
        """
        xp = namespace(self.kv_idx)
        positions = xp.arange(self.q_len)[:, None], xp.arange(self.kv_len)[None, :]
        kind = self.to_map()[:, :, positions[0] // self.block_q, positions[1] // self.block_kv]
        if self.bank is not None:
            ids = spread(self.kv_idx, self.kv_bank, self.q_idx.shape[-2])
            ids = ids[:, :, positions[0] // self.block_q, positions[1] // self.block_kv]
            seen = self.bank[ids, positions[0] % self.block_q, positions[1] % self.block_kv]
        elif self.mask is not None:
            heads = None if num_heads is None else np.arange(num_heads)[:, None, None]
            if num_heads is not None:
                kind = xp.repeat(kind, num_heads // kind.shape[1], axis=1)
            with jax.ensure_compile_time_eval():
                seen = self.mask.elem(np.arange(self.q_len)[:, None], np.arange(self.kv_len)[None, :], heads)
                seen = np.asarray(seen)
        dense = (kind == FULL) | ((kind == PARTIAL) & seen)
        return dense if num_heads is None else xp.repeat(dense, num_heads // dense.shape[1], axis=1)

    def show(self, batch: int = 0, head: int = 0) -> None:
        """Print a picture of the lists of one batch row and head."""
        kind, cell, caption = self._picture(batch, head, TEXT_CELLS)
        print(draw_text(kind, cell, caption))

    def _repr_svg_(self) -> str:
        kind, _, caption = self._picture(0, 0, SVG_CELLS)
        return draw_svg(kind, caption)

    def _picture(self, batch: int, head: int, most: int) -> tuple[np.ndarray, tuple[int, int], str]:
        """The kinds of at most `most` by `most` cells, the positions of a cell and the caption."""
        kind = np.asarray(self.to_map())[batch, head]
        kind, blocks = coarse(kind, most)
        cell = blocks * self.block_q, blocks * self.block_kv
        return kind, cell, f"{self!r}   one cell is {cell[0]} x {cell[1]} positions"

    def __repr__(self) -> str:
        rule = f"bank of {len(self.bank) - 1}" if self.bank is not None else repr(self.mask)
        batch, heads, nq, width = self.kv_idx.shape
        lists = f"{batch} x {heads} lists" if batch * heads > 1 else "one list"
        kind = "static" if self.is_static else "dynamic"
        return (
            f"BlockMask({rule}, {self.q_len} x {self.kv_len} in blocks of {self.block_q} x {self.block_kv}, "
            f"{kind}, {lists} of {nq} rows up to {width} long)"
        )


def create_block_mask(
    predicate: Callable[[Any, Any, Any, Any], Any],
    batch: int | None,
    heads: int | None,
    q_len: int,
    kv_len: int,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """The blocks of a plain Python predicate `(b, h, q, k) -> bool`, found by asking it about every pair once.

    For what `jattn.masks` cannot say; symbolic masks are classified without asking pair by pair.

    Args:
      predicate: called with integers b and h, positions q `[block_q, 1]` and k `[1, S]` (NumPy integers); it returns
        booleans that broadcast to `[block_q, S]`. It may read NumPy and JAX arrays of its surroundings.
      batch, heads: how many batch rows and heads have masks of their own; `None` is one for all, asked with 0.

    Returns:
      A static mask with a bank. Time is O(B N T S). Memory beyond the result is one row of blocks, `[block_q, S]`, at a
      time; the result stores each distinct partial block once, block_q block_kv bytes.

    Raises:
      TypeError: the predicate does not return booleans, or it reads a traced array: compute the mask outside of jit, or
        give ids as `segment_ids`, a selection as `BlockMask.from_map`, other data as `captured` of a `score_mod`.
    """
    shape = tuple(1 if n is None else check_count(name, n) for name, n in (("batch", batch), ("heads", heads)))
    _counts(q_len, kv_len, block_q, block_kv)
    k = np.arange(kv_len, dtype=np.int32)[None, :]

    def rows(b: int, h: int, rows: slice) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            seen = predicate(b, h, np.arange(rows.start, rows.stop, dtype=np.int32)[:, None], k)
        if isinstance(seen, jax.core.Tracer):
            raise TypeError(f"predicate: {_TRACED}")
        seen = np.asarray(seen)
        if seen.dtype != np.bool_:
            raise TypeError(f"predicate: expected booleans, got {seen.dtype}; compare, and combine with &, | and ~")
        return np.broadcast_to(seen, (rows.stop - rows.start, kv_len))

    kind, bank, ids = blocks_of_rows(rows, (*shape, q_len, kv_len), (block_q, block_kv))
    return BlockMask.from_map(kind, q_len, kv_len, block_q, block_kv, bank=bank, bank_ids=ids)


_TRACED = (
    "it reads a traced array, and a mask holds static numbers only; compute it outside of jit, or give ids as "
    "segment_ids=, a selection as BlockMask.from_map or from_indices, other data as captured= of a score_mod"
)


def check_static(name: str, mask: Mask) -> None:
    """No `Fn` in `mask` reads a traced array."""
    for term in mask.terms if isinstance(mask, (And, Or)) else (mask.term,) if isinstance(mask, Not) else ():
        check_static(name, term)
    if isinstance(mask, Fn):
        zero = np.zeros((1, 1), np.int32)
        if any(isinstance(a, jax.core.Tracer) for a in jax.make_jaxpr(mask.function)(zero, zero, zero).consts):
            raise TypeError(f"{name}: {_TRACED}")


def listed_kinds(
    listed: Bool[AnyArray, "Bm Nm nq nk"], mask: Mask | None, q_len: int, kv_len: int, block_q: int, block_kv: int
) -> Int8[AnyArray, "Bm Nm nq nk"]:
    """The kinds that `mask` gives the listed blocks; the others are empty."""
    kinds = (Full() if mask is None else mask).block_kinds(q_len, kv_len, block_q, block_kv)
    return namespace(listed).where(listed, kinds, np.int8(EMPTY))


@functools.lru_cache(maxsize=512)
def _from_expr(mask: Mask, q_len: int, kv_len: int, block_q: int, block_kv: int) -> BlockMask:
    kind = mask.block_kinds(q_len, kv_len, block_q, block_kv)
    built = BlockMask.from_map(kind, q_len, kv_len, block_q, block_kv, mask=mask)
    for array in jax.tree.leaves(built):
        array.flags.writeable = False
    return built


def _assembled(
    q_len: int, kv_len: int, block_q: int, block_kv: int, mask: Mask | None, bank: Any, by_row: Lists, by_col: Lists
) -> BlockMask:
    return BlockMask(
        q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, mask=mask, bank=bank,
        kv_idx=by_row.idx, n_partial=by_row.n_partial, n_total=by_row.n_total, kv_bank=by_row.bank,
        q_idx=by_col.idx, qn_partial=by_col.n_partial, qn_total=by_col.n_total, q_bank=by_col.bank,
    )  # fmt: skip


def _repeats(idx: Any) -> Any:
    ordered = namespace(idx).sort(idx, axis=-1)
    return ordered[..., 1:] == ordered[..., :-1]


def _width(name: str, width: int | None, kind: Any) -> int:
    """The width of the lists of `kind`: as given, else the longest static list, else all candidates."""
    if not isinstance(kind, np.ndarray):
        return kind.shape[-1] if width is None else min(check_count(name, width), kind.shape[-1])
    longest = max(1, int(np.count_nonzero(kind, axis=-1).max()))
    if width is not None and check_count(name, width) < longest:
        raise ValueError(f"{name}: a list has {longest} blocks, got room for {width}")
    return longest if width is None else width


def _counts(q_len: int, kv_len: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """How many blocks of queries and of keys there are."""
    for name, n in (("q_len", q_len), ("kv_len", kv_len), ("block_q", block_q), ("block_kv", block_kv)):
        check_count(name, n)
    return math.ceil(q_len / block_q), math.ceil(kv_len / block_kv)


def _four_axes(name: str, x: Any, rows: int | None, cols: int | None) -> Any:
    """`x` with as many leading axes of 1 as it takes to have 4, checked against the last two; `None` is any size."""
    check_array(name, x)
    wanted = f"[..., {'rows' if rows is None else rows}, {'columns' if cols is None else cols}]"
    if not 2 <= x.ndim <= 4 or rows not in (None, x.shape[-2]) or cols not in (None, x.shape[-1]) or 0 in x.shape:
        raise ValueError(f"{name}: expected {wanted} with at most a batch and a head axis before, got {tuple(x.shape)}")
    return x.reshape(*[1] * (4 - x.ndim), *x.shape)
