"""Neighborhood attention of small windows on TPU: a whole image on the chip, a tile of queries against all its keys.

For a tile of queries and the keys that it reads, with the table of `tables` in logits to the base 2, upright: keys go
down, queries of all heads together go across,

    u = scale log2(e) k q^T + table          m = colmax u      p = 2^(u - m)      l = colsum p
    o^T = v^T p / l                          lse = (m + log2 l) ln 2

Heads are lanes. A product for all of them at once has the queries of each with the other heads' lanes zeroed: it fills
the depth of the matrix units, which a head of 32 channels does not. Of v^T p the rows of a head are taken from its own
columns. Keys and values are held in float32, whose rows may be read from any place on. Backward, for a tile at a time,

    p = 2^(u - lse log2(e))        dp = v do^T         ds = p (dp - colsum(p dp) + dlse)
    dq^T = scale k^T ds            dk += scale ds q    dv += p do        dtable += ds

where sums over tiles stay on the chip, in float32 and in the order of the tiles; those of the table over all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse.walk import Refs, dot
from pallas_kernels.neighborhood.tables import Along, Problem

LOG2E = math.log2(math.e)
TURN = 16
"""Tiles of a turn of the loop over them, about: they are scheduled as one."""
ABREAST = 2
"""Tiles in one stage at a time."""
VMEM = 56 * 2**20


class Tile(NamedTuple):
    """A tile of queries: its rows, of which the last tile has fewer, its columns, and the keys that it reads."""

    row: Any
    column: int
    rows: Any
    columns: slice
    keys: tuple[Any, Any]
    kind: Any


def _tiles(p: Problem, r: Refs, visit: Callable[[list[Tile]], None]) -> None:
    """Visits all tiles of an image, a few at a time."""
    x, y = p.x, p.y
    group = jax.lax.rem(pl.program_id(1), jnp.int32(len(x.start) * len(y.start)))
    of_x, of_y = group // len(y.start), group % len(y.start)

    def tiles(row: Any, size: int) -> list[Tile]:
        first, kind = _place(r.along_x, x, of_x, row)
        rows, found = pl.ds(row * x.tile, size), []
        for column in range(y.tiles):
            begin, kind_y = _place(r.along_y, y, of_y, column)
            columns = slice(column * y.tile, min((column + 1) * y.tile, p.grid[1]))
            keys = pl.ds(first, x.reach), pl.ds(begin, y.reach)
            found.append(Tile(row, column, rows, columns, keys, kind * y.kinds + kind_y))
        return found

    whole, rest = divmod(p.grid[0], x.tile)
    each = max(1, TURN // y.tiles)
    turns = whole // each

    def turn(t: Any, _: None) -> None:
        visit([tile for i in range(each) for tile in tiles(t * each + i, x.tile)])

    if turns:
        jax.lax.fori_loop(0, turns, turn, None)
    left = [tile for row in range(turns * each, whole) for tile in tiles(row, x.tile)]
    left += tiles(whole, rest) if rest else []
    if left:
        visit(left)


def _place(table: Any, along: Along, group: Any, tile: Any) -> tuple[Any, Any]:
    """Where the keys of a tile begin, and its kind."""
    if len(along.start) == 1 and isinstance(tile, int):
        return int(along.start[0, tile]), int(along.kind[0, tile])
    at = 2 * (group * along.tiles + tile)
    return table[at], table[at + 1]


def _hold(p: Problem, given: Any, held: Any) -> None:
    """An image in float32, with zeros where there is nothing: what is not seen is multiplied by 0."""
    x = given[...].astype(held.dtype)
    if p.heads % p.together:
        x = jnp.where(_lane(x.ndim, p.lanes) < _lanes_left(p), x, 0)
    rows, columns = p.key_grid
    held[:, :columns] = x
    if p.y.held > columns:
        held[:, columns:] = jnp.zeros((rows, p.y.held - columns, p.lanes), held.dtype)


def _lane(ndim: int, lanes: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (ndim - 1) + (lanes,), ndim - 1)


def _lanes_left(p: Problem) -> Any:
    """Lanes from this program's first on that belong to heads."""
    return p.heads * p.width - pl.program_id(0) * p.lanes


def _around(p: Problem, held: Any, tile: Tile) -> jax.Array:
    """The keys or values that a tile reads, one below the other."""
    return held[tile.keys].reshape(p.keys, p.lanes).astype(p.dtype)


def _by_head(p: Problem, ref: Any, tile: Tile) -> jax.Array:
    """The queries of a tile once for each head, with nothing in the lanes of others."""
    x = ref[tile.rows, tile.columns].astype(jnp.float32)
    beyond = [(0, t - size) for t, size in zip(p.tile, x.shape, strict=False)]
    if any(after for _, after in beyond):
        x = jnp.pad(x, [*beyond, (0, 0)])
    x = x.reshape(p.queries, p.lanes)
    lane, heads = _lane(2, p.lanes), []
    for h in range(p.together):
        own = (lane >= h * p.width) & (lane < (h + 1) * p.width)
        if p.heads % p.together:
            own &= lane < _lanes_left(p)
        heads.append(jnp.where(own, x, 0))
    return (heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=0)).astype(p.dtype)


def _put(p: Problem, ref: Any, tile: Tile, x: jax.Array, factor: Any) -> None:
    """Writes a tile from `[lanes, columns]`, times a factor for each column."""
    heads = []
    for h in range(p.together):
        own = slice(h * p.width, (h + 1) * p.width), slice(h * p.queries, (h + 1) * p.queries)
        heads.append(x[own] * (factor if isinstance(factor, float) else factor[:, own[1]]))
    upright = heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=0)
    rows, columns = tile.rows.size, tile.columns.stop - tile.columns.start
    by_place = upright.T.reshape(*p.tile, p.lanes)[:rows, :columns]
    ref[tile.rows, tile.columns] = by_place.astype(ref.dtype)


def _in_turn(tiles: list[Tile], *stages: Callable[..., Any]) -> None:
    """All stages of all tiles: each takes a tile and what the one before found, while later tiles are in earlier ones.

    The units of the chip would else stand still until the last of a tile's products has come.
    """
    abreast = [tiles[i : i + ABREAST] for i in range(0, len(tiles), ABREAST)]
    found: dict[int, list[Any]] = {i: [()] * len(some) for i, some in enumerate(abreast)}
    for turn in range(len(abreast) + len(stages) - 1):
        for late, stage in enumerate(stages):
            i = turn - late
            if 0 <= i < len(abreast):
                found[i] = [stage(tile, *before) for tile, before in zip(abreast[i], found[i], strict=True)]


def _forward_kernel(p: Problem, r: Refs) -> None:
    _hold(p, r.key, r.held_keys)
    _hold(p, r.value, r.held_values)

    def scores(tile: Tile) -> Any:
        products = dot(_around(p, r.held_keys, tile), _by_head(p, r.query, tile), (1, 1))
        return (products * (p.scale * LOG2E) + r.table[tile.kind],)

    def softmax(tile: Tile, u: jax.Array) -> Any:
        m = jnp.max(u, axis=0, keepdims=True)
        weights = jnp.exp2(u - m)
        return weights.astype(p.dtype), m, jnp.sum(weights, axis=0, keepdims=True)

    def sums(tile: Tile, weights: jax.Array, m: jax.Array, l: jax.Array) -> Any:
        return dot(_around(p, r.held_values, tile).T, weights), 1 / l, (m + jnp.log2(l)) * math.log(2)

    def end(tile: Tile, out: jax.Array, factor: jax.Array, lse: jax.Array) -> None:
        _put(p, r.out, tile, out, factor)
        r.lse[tile.row, tile.column : tile.column + 1] = lse

    _tiles(p, r, lambda tiles: _in_turn(tiles, scores, softmax, sums, end))


def _backward_kernel(p: Problem, r: Refs) -> None:
    _hold(p, r.key, r.held_keys)
    _hold(p, r.value, r.held_values)
    for total in (r.key_sums, r.value_sums):
        total[...] = jnp.zeros_like(total)
    if r.dtable is not None:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            r.dtable[...] = jnp.zeros_like(r.dtable)

    def scores(tile: Tile) -> Any:
        key, query, d_out = _around(p, r.held_keys, tile), _by_head(p, r.query, tile), _by_head(p, r.out_gradient, tile)
        u = dot(key, query, (1, 1)) * (p.scale * LOG2E) + r.table[tile.kind]
        return query, d_out, u, dot(_around(p, r.held_values, tile), d_out, (1, 1))

    def softmax(tile: Tile, query: jax.Array, d_out: jax.Array, u: jax.Array, dp: jax.Array) -> Any:
        row = slice(tile.column, tile.column + 1)
        weights = jnp.exp2(u - r.lse[tile.row, row] * LOG2E)
        delta = jnp.sum(weights * dp, axis=0, keepdims=True) - r.lse_gradient[tile.row, row]
        return query, d_out, weights, weights * (dp - delta)

    def sums(tile: Tile, query: jax.Array, d_out: jax.Array, weights: jax.Array, ds: jax.Array) -> Any:
        short = ds.astype(p.dtype)
        dk, dv = dot(short, query), dot(weights.astype(p.dtype), d_out)
        return dk, dv, dot(_around(p, r.held_keys, tile).T, short), ds

    def end(tile: Tile, dk: jax.Array, dv: jax.Array, dq: jax.Array, ds: jax.Array) -> None:
        shape = (p.x.reach, p.y.reach, p.lanes)
        dk, dv = r.key_sums[tile.keys] + dk.reshape(shape), r.value_sums[tile.keys] + dv.reshape(shape)
        if r.dtable is not None:
            ds = r.dtable[tile.kind] + ds
            r.dtable[tile.kind] = ds
        r.key_sums[tile.keys] = dk
        r.value_sums[tile.keys] = dv
        _put(p, r.dq, tile, dq, p.scale)

    _tiles(p, r, lambda tiles: _in_turn(tiles, scores, softmax, sums, end))
    r.dk[...] = (r.key_sums[:, : p.key_grid[1]] * p.scale).astype(r.dk.dtype)
    r.dv[...] = r.value_sums[:, : p.key_grid[1]].astype(r.dv.dtype)


def _call(
    p: Problem,
    kernel: Callable[[Problem, Refs], None],
    name: str,
    operands: Mapping[str, jax.Array],
    results: Sequence[str],
    scratch: Sequence[str],
    products: int,
) -> dict[str, jax.Array]:
    """Runs a kernel for every group of heads and image; arrays are known by their names.

    Args:
      scratch: images in float32.
      products: of matrices, of all logits.
    """
    x, y = p.x, p.y
    grids = dict.fromkeys(("key", "value", "dk", "dv"), p.key_grid)

    def image(name: str) -> pl.BlockSpec:
        return pl.BlockSpec((None, *grids.get(name, p.grid), p.lanes), lambda g, b, *_: (b, 0, 0, g))

    tables = operands["table"].shape[0]
    table = pl.BlockSpec((None, p.kinds, p.keys, p.columns), lambda g, b, *_: (g if tables > 1 else 0, 0, 0, 0))
    rows = pl.BlockSpec((None, None, x.tiles, y.tiles, p.columns), lambda g, b, *_: (g, b, 0, 0, 0))
    of_name = {"table": table, "dtable": table, "lse": rows, "lse_gradient": rows}
    f32 = jnp.float32
    shapes = {
        "lse": ((p.programs, p.batch, x.tiles, y.tiles, p.columns), f32),
        "dtable": ((p.programs, p.kinds, p.keys, p.columns), f32),
    }
    axes = jax.typeof(operands["query"]).manual_axis_type
    out_shape = []
    for result in results:
        shape, dtype = shapes.get(result, ((p.batch, *grids.get(result, p.grid), p.heads * p.width), p.dtype))
        out_shape.append(jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes))
    places = {name: operands[name] for name in ("along_x", "along_y")}
    given = {name: array for name, array in operands.items() if name not in places}
    names = [*places, *given, *results, *scratch]
    logits = p.programs * p.batch * x.tiles * y.tiles * p.keys * p.columns
    arrays: list[Any] = [*given.values(), *out_shape]
    found = pl.pallas_call(
        lambda *refs: kernel(p, Refs(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(places),
            grid=(p.programs, p.batch),
            in_specs=[of_name.get(each) or image(each) for each in given],
            out_specs=[of_name.get(each) or image(each) for each in results],
            scratch_shapes=[pltpu.VMEM((p.key_grid[0], y.held, p.lanes), f32) for _ in scratch],
        ),
        out_shape=out_shape,
        name=name,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * p.lanes,
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
            transcendentals=logits,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY if "dtable" in results else pltpu.PARALLEL),
            vmem_limit_bytes=VMEM,
        ),
        interpret=p.interpret,
    )(*places.values(), *given.values())
    return dict(zip(results, found, strict=True))


def forward(p: Problem, operands: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, X, Y, N * H]` and log-sum-exps `[programs, B, X tiles, Y tiles, columns]`.

    Args:
      operands: query, key, value `[B, X, Y, N * H]`, of which keys and values may have more rows and columns; table (to
        the base 2), and along_x and along_y, from `places`.
    """
    name = "neighborhood_attention_forward"
    found = _call(p, _forward_kernel, name, operands, ("out", "lse"), ("held_keys", "held_values"), 2)
    return found["out"], found["lse"]


def backward(p: Problem, operands: Mapping[str, jax.Array], *, with_table: bool) -> dict[str, jax.Array]:
    """Gradients dq, dk, dv, and with_table dtable.

    Args:
      operands: as `forward` takes them, and lse, out_gradient, lse_gradient.
    """
    results = ("dq", "dk", "dv", *(("dtable",) if with_table else ()))
    scratch = ("held_keys", "held_values", "key_sums", "value_sums")
    return _call(p, _backward_kernel, "neighborhood_attention_backward", operands, results, scratch, 5)
