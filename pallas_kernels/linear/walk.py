"""What the walks over the chunks of a sequence share on TPU: sizes, weights of gates, order of work, blocks.

A grid step holds `chunks` chunks of `heads` heads. Within one head every product waits for the one before it, so the
units (chunk, head) are written interleaved: what does not wait for the state is begun `lag` units ahead. Arrays are
read as [B, T, heads * width]: a head is a range of lanes, and nothing is transposed in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import gates
from pallas_kernels.linear.tiling import Tiling

Operand = tuple[str, jax.Array]
"""The name of its block, as in `specs`, and an array."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of a call.

    There is a state for each of `heads` value heads. `group` query heads read one state, or `shared` states have one
    query and one key head; `constant` gates are tables. `eps` says that outputs are divided by q (z + eps[1]) + eps[0].
    `packed` says that the kernel of channels is told where sequences begin. States are [H, V], or if `turned` [V, H].
    """

    batch: int
    length: int
    heads: int
    group: int
    width: int
    value_width: int
    constant: bool
    scale: float
    dtype: Any
    tiling: Tiling
    interpret: bool
    shared: int = 1
    eps: tuple[float, float] | None = None
    turned: bool = False
    packed: bool = False

    @property
    def state(self) -> tuple[int, int]:
        return (self.value_width, self.width) if self.turned else (self.width, self.value_width)

    @property
    def steps(self) -> int:
        return -(-self.length // self.tiling.tokens)

    @property
    def padded(self) -> int:
        """The length in whole steps of the forward walk: that of the arrays that are made for the kernels."""
        longest = self.tiling.forward.tokens
        return -(-self.length // longest) * longest

    @property
    def key_heads(self) -> int:
        """In a grid step."""
        return self.tiling.heads // self.shared

    def queries(self, head: int) -> range:
        """The query heads of state `head`, in a grid step."""
        if self.shared > 1:
            return range(head // self.shared, head // self.shared + 1)
        return range(head * self.group, (head + 1) * self.group)

    def outputs(self, head: int) -> range:
        """The heads of the output that are read from state `head`, in a grid step."""
        return range(head * self.group, (head + 1) * self.group)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads // self.tiling.heads, self.steps


class Weights(NamedTuple):
    """What the gates of one chunk do for one head; `total` is one row."""

    pair: jax.Array
    read: jax.Array
    write: jax.Array
    total: jax.Array


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b, contracting dimension `over[0]` of a with `over[1]` of b, added up in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def weights(p: Problem, refs: Sequence[Any], *, turned: bool = False) -> Callable[[int, int], Weights]:
    """The weights of (chunk, head) of this grid step, `pair` of queries and keys or, if `turned`, of keys and queries.

    What the heads of a chunk share is computed once. Tables of constant gates are as they come.
    """
    size = p.tiling.chunk
    if p.constant:
        pair, read, write = refs
        # Tables are as wide as the wider of q and v.
        return lambda _, h: Weights(pair[h], read[h], write[h], read[h, size - 1 : size])
    (sums,) = refs
    exp, add = gates.exponential(p.dtype), functools.partial(functools.reduce, jnp.add)
    count, width = gates.parts(p.dtype), max(size, p.width, p.value_width)
    query, key = (iota((size, size), axis) for axis in ((1, 0) if turned else (0, 1)))

    flat = [sums[0, 0, :, c * size : (c + 1) * size] for c in range(p.tiling.chunks)]
    # All turned at once: a column each, of which a register holds 128 as well as one.
    tall, rows_of_chunk = jnp.concatenate(flat, axis=0).T, count * p.tiling.heads

    def of(c: int, h: int) -> Weights:
        own = range(count * h, count * (h + 1))
        lanes = [c * rows_of_chunk + i for i in own]
        # A column costs a broadcast along the lanes; exponentials of it are cheaper than more columns.
        columns = [jnp.broadcast_to(tall[:, i : i + 1], (size, width)) for i in lanes]
        rows = [flat[c][i : i + 1] for i in own]
        pairs = [(column[:, :size], row) for column, row in zip(columns, rows, strict=True)]
        exponent = add(row - column if turned else column - row for column, row in pairs)
        return Weights(
            jnp.where(query >= key, exp(exponent), 0),
            exp(add(columns)),
            exp(add(column[size - 1 :] - column for column in columns)),
            exp(add(column[size - 1 :] for column in columns)),
        )

    return of


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def rows(p: Problem, c: Any) -> Any:
    """Those of chunk `c`, which may be traced."""
    size = p.tiling.chunk
    return slice(c * size, (c + 1) * size) if isinstance(c, int) else pl.ds(pl.multiple_of(c * size, size), size)


def part(p: Problem, ref: Any, c: Any, h: int, width: int, *, step: Any = None) -> jax.Array:
    """Chunk `c` of head `h`; rows after the last token are 0 where `step` says which grid step this is."""
    size = p.tiling.chunk
    x = ref[0, rows(p, c), h * width : (h + 1) * width]
    if step is None or p.length % p.tiling.tokens == 0:
        return x
    row = step * p.tiling.tokens + c * size + iota(x.shape, 0)
    return jnp.where(row < p.length, x, 0)


def put(p: Problem, ref: Any, c: Any, h: int, x: jax.Array) -> None:
    """Writes chunk `c` of head `h`, in the dtype of the array."""
    width = x.shape[1]
    ref[0, rows(p, c), h * width : (h + 1) * width] = x.astype(ref.dtype)


@contextlib.contextmanager
def carried(p: Problem, ref: Any, begin: Any, end: Any) -> Iterator[Any]:
    """What the heads carry from one grid step to the next: `begin` before the first, and after the last also `end`."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        ref[...] = begin[0]

    yield ref

    @pl.when(pl.program_id(2) == p.steps - 1)
    def _() -> None:
        end[0] = ref[...]


def keep(kept: Any, state: Any, c: Any, every: int) -> None:
    """Writes the state before chunk `c`, if that is one of `every` so many."""

    @pl.when(c % every == 0)
    def _() -> None:
        kept[0, c // every] = state[...]


class SharedSums:
    """Gradients of query and key heads that several states share: written once the last of these has said its part."""

    def __init__(self, p: Problem) -> None:
        self._p, self._sums = p, dict[tuple[int, int], Any]()

    def add(self, ref: Any, x: jax.Array, c: Any, n: int, *, last: bool) -> None:
        x = x + self._sums.pop((id(ref), n), 0)
        if last:
            put(self._p, ref, c, n, x)
        else:
            self._sums[id(ref), n] = x


def interleaved(units: Sequence[Any], lag: int, begin: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Every unit and what `begin` makes of it, begun `lag` units ahead of its turn."""
    begun: dict[Any, Any] = {}
    for i, unit in enumerate(units):
        for ahead in units[i : i + lag + 1]:
            if ahead not in begun:
                begun[ahead] = begin(ahead)
        yield unit, begun.pop(unit)


def every_second(x: jax.Array, size: int, *, first: int = 1) -> jax.Array:
    """The second of every two strips of `size` rows, or with `first=0` the first."""
    return jnp.concatenate([x[i : i + size] for i in range(first * size, x.shape[0], 2 * size)], axis=0)


def with_gaps(x: jax.Array, size: int, *, first: int = 1) -> jax.Array:
    """Strips of `size` rows where `every_second` took them, zeros between."""
    gap = jnp.zeros((size, x.shape[1]), x.dtype)
    strips = [x[i : i + size] for i in range(0, x.shape[0], size)]
    return jnp.concatenate([y for strip in strips for y in ((gap, strip) if first else (strip, gap))], axis=0)


def together(streams: Iterable[Iterator[None]]) -> Iterator[None]:
    """Runs generators side by side, each to its next `yield`: what waits in one is hidden behind the others."""
    running = list(streams)
    while running := [stream for stream in running if next(stream, running) is None]:
        yield


def lockstep(streams: Iterable[Iterator[None]]) -> None:
    """Runs generators `together` to their ends."""
    for _ in together(streams):
        pass


def delayed(stream: Iterator[None], turns: int) -> Iterator[None]:
    """Begins so many turns later."""
    for _ in range(turns):
        yield
    yield from stream


def chunks(
    p: Problem, work: Callable[[Sequence[Any]], None], *, together: int | None = None, backward: bool = False
) -> None:
    """Does `work` with the numbers of a step's chunks in their order: all of them, or so many a turn of a loop.

    A loop is less code, and what one of its turns waits for no other hides.
    """
    count = p.tiling.chunks
    together = math.gcd(count, together or count)

    def turn(i: Any, _: None) -> None:
        order = [i * together + j for j in range(together)]
        work([count - 1 - c for c in order] if backward else order)

    if together == count:
        turn(0, None)
    else:
        jax.lax.fori_loop(0, count // together, turn, None)


def specs(p: Problem, *, starts: int, backward: bool = False) -> dict[str, pl.BlockSpec]:
    """Blocks of every kind of array, at the grid step's place in time; `starts` states are kept in a step."""
    t = p.tiling
    when = (lambda i: p.steps - 1 - i) if backward else (lambda i: i)

    def tokens(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, t.tokens, width), lambda b, h, i: (b, when(i), h))

    def table(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((t.heads, t.chunk, width), lambda b, h, i: (h, 0, 0))

    def per_head(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, count * t.heads, t.tokens), lambda b, h, i: (b, h, 0, when(i)))

    state = (t.heads, *p.state)
    return {
        "query": tokens(p.key_heads * p.group * p.width),
        "key": tokens(p.key_heads * p.width),
        "channels": tokens(t.heads * p.width),
        "value": tokens(t.heads * p.value_width),
        "out": tokens(t.heads * p.group * p.value_width),
        "pair": table(t.chunk),
        "wide": table(max(p.width, p.value_width)),
        "gates": per_head(gates.parts(p.dtype)),
        "sums": per_head(1),
        "two sums": per_head(2),
        "by chunk": pl.BlockSpec((1, 1, t.chunks, t.heads, t.chunk), lambda b, h, i: (b, h, when(i), 0, 0)),
        "borders": pl.BlockSpec((1, t.chunks, 1, t.chunk), lambda b, h, i: (b, when(i), 0, 0)),
        "by query": per_head(p.group),
        "state": pl.BlockSpec((1, *state), lambda b, h, i: (b, h, 0, 0)),
        "starts": pl.BlockSpec((1, starts, *state), lambda b, h, i: (b, when(i), h, 0, 0)),
        "z": pl.BlockSpec((1, 1, t.heads, p.width), lambda b, h, i: (b, h, 0, 0)),
        "z starts": pl.BlockSpec((1, starts, 1, t.heads, p.width), lambda b, h, i: (b, when(i), h, 0, 0)),
    }


def gate_names(p: Problem) -> tuple[str, ...]:
    """The blocks of what `call.gate_arrays` makes."""
    return ("pair", "wide", "wide") if p.constant else ("gates",)


def forward(
    p: Problem,
    kernel: Any,
    name: str,
    macs: int,
    operands: Sequence[Operand],
    *,
    keep: bool,
    out_dtype: Any,
    scratch: Sequence[Any] = (),
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The results: outputs `[B, T, heads * V]` and the state after the last token; if divided, z and the divisors too.

    And to `keep` the state, and z, before every step of the backward walk.

    Args:
      kernel: of the problem, how many chunks lie between states that are kept (0: none is), and the references.
      macs: multiplications of a token and state.
      operands: the query first.
      scratch: the kernel's last references are these and what is carried.
    """
    every, times, query = p.tiling.chunks if keep else 0, p.tiling.times, operands[0][1]
    p = dataclasses.replace(p, tiling=p.tiling.forward)
    t, state = p.tiling, p.state
    groups = p.heads // t.heads

    def result(block: str, *sizes: int) -> tuple[str, jax.ShapeDtypeStruct]:
        return block, shape((p.batch, *sizes), jnp.float32, query)

    out = shape((p.batch, p.length, p.heads * p.group * p.value_width), out_dtype, query)
    results, kept = (
        [("out", out), result("state", p.heads, *state)],
        [result("starts", p.steps * times, p.heads, *state)],
    )
    carried = [pltpu.VMEM((t.heads, *state), jnp.float32)]
    if p.eps is not None:
        results += [result("z", groups, t.heads, p.width), result("by query", groups, t.heads * p.group, p.padded)]
        kept.append(result("z starts", p.steps * times, groups, t.heads, p.width))
        carried.append(pltpu.VMEM((t.heads, p.width), jnp.float32))
    wanted = [*results, *(kept if keep else [])]
    kernel = functools.partial(kernel, p, every)
    found = _call(p, kernel, name, macs, operands, wanted, [*scratch, *carried], specs(p, starts=times))
    return found[: len(results)], found[len(results) :]


def backward(
    p: Problem,
    kernel: Any,
    name: str,
    macs: int,
    operands: Sequence[Operand],
    more: Sequence[tuple[str, Sequence[int]]],
    scratch: Sequence[Any] = (),
) -> list[jax.Array]:
    """Gradients of query, key, value and the initial state, and `more` float32 arrays: their blocks and shapes.

    The kernel's last references are the states of the step, `scratch`, and the gradient that is carried.
    """
    query, state = operands[0][1], (p.tiling.heads, *p.state)
    results = [
        *((block, shape(x.shape, x.dtype, query)) for block, x in operands[:3]),
        ("state", shape((p.batch, p.heads, *state[1:]), jnp.float32, query)),
        *((block, shape(sizes, jnp.float32, query)) for block, sizes in more),
    ]
    states = pltpu.VMEM((p.tiling.chunks + 1, *state), jnp.float32)
    scratches = [states, *scratch, pltpu.VMEM(state, jnp.float32)]
    blocks = specs(p, starts=1, backward=True)
    return _call(p, functools.partial(kernel, p), name, macs, operands, results, scratches, blocks)


def _call(
    p: Problem,
    kernel: Any,
    name: str,
    macs: int,
    operands: Sequence[Operand],
    results: Sequence[tuple[str, jax.ShapeDtypeStruct]],
    scratch: Sequence[Any],
    blocks: dict[str, pl.BlockSpec],
) -> Any:
    moved = sum(x.size * x.dtype.itemsize for _, x in operands) + sum(x.size * x.dtype.itemsize for _, x in results)
    return pl.pallas_call(
        kernel,
        grid=p.grid,
        name=name,
        in_specs=[blocks[block] for block, _ in operands],
        out_specs=[blocks[block] for block, _ in results],
        out_shape=[x for _, x in results],
        scratch_shapes=scratch,
        cost_estimate=pl.CostEstimate(
            flops=2 * p.batch * p.padded * p.heads * macs, bytes_accessed=moved, transcendentals=0
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=p.tiling.vmem
        ),
        interpret=p.interpret,
    )(*(x for _, x in operands))


def shape(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
