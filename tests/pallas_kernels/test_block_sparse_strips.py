"""Strips of numbers for distances, interpreted, against the distances of all pairs of tokens one by one."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import strips, walk
from pallas_kernels.block_sparse.strips import Strip

BOXES = {
    "a line": ((128,), (256,), (11,)),
    "an image": ((16, 8), (8, 16), (5, 37)),
    "long queries": ((16, 16), (16, 8), (3, 23)),
    "tiles and rows that do not line up": ((3, 128), (1, 256), (3, 5)),
    "a volume": ((2, 4, 16), (4, 8, 8), (3, 5, 21)),
    "one query along the middle axis": ((16, 1, 8), (4, 4, 8), (5, 3, 7)),
}


def tokens(box):
    return np.stack([x.reshape(-1) for x in np.meshgrid(*map(np.arange, box), indexing="ij")])


def entries(apart, queries, keys, sizes):
    """Of all pairs of tokens in blocks so far apart: their entry of a flat table, or -1."""
    distance = np.array(apart)[:, None, None] + tokens(keys)[:, None, :] - tokens(queries)[:, :, None]
    place = distance + np.array(sizes)[:, None, None] // 2
    inside = ((place >= 0) & (place < np.array(sizes)[:, None, None])).all(axis=0)
    return np.where(inside, np.ravel_multi_index(tuple(np.where(inside, place, 0)), sizes), -1)


def on_the_chip(strip, origins, table, dy):
    """The numbers of pairs of blocks, and the gradients of lines from those of pairs."""
    (rows, columns) = dy.shape[1:]
    made = strips.lines(strip, table)[0]

    def kernel(lines, sources, dy, tiles, dlines, held, sums):
        strips.make(strip, lines, sources, held)
        strips.clear(strip, sums)
        for pair, origin in enumerate(origins):
            for at in itertools.product(walk.parts(rows, rows // 2), walk.parts(columns, 128)):
                tiles[pair, *at] = strips.tile(strip, held, jnp.int32(origin), *at)
                strips.add(strip, sums, jnp.int32(origin), *at, dy[pair, *at])
        strips.total(strip, sums, sources, dlines)

    lanes = strip.lanes
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(dy.shape, jnp.float32),
            jax.ShapeDtypeStruct((strip.patterns, lanes), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((strip.rows, size), jnp.float32) for size in (lanes, lanes + strip.reach)],
        interpret=True,
    )(made, jnp.asarray(strips.sources(strip)), dy)


@pytest.mark.parametrize("name", BOXES)
def test_a_strip_holds_the_numbers_of_all_pairs_and_their_gradients_add_up(name):
    queries, keys, sizes = BOXES[name]
    firsts = [
        np.array(
            list(
                itertools.product(*(range(0, max(q, k) + 1, own) for q, k, own in zip(queries, keys, box, strict=True)))
            )
        )
        for box in (queries, keys)
    ]
    apart = firsts[1][None] - firsts[0][:, None]
    least, most = (tuple(f(apart, axis=(0, 1)).tolist()) for f in (np.min, np.max))
    strip = Strip(queries, keys, least, most)
    strip.check(2**24)
    q_code, kv_code = strip.codes(*(x.T for x in firsts))
    rng = np.random.default_rng(0)
    pairs = list(itertools.product(range(len(q_code)), range(len(kv_code))))
    pairs = [pairs[i] for i in rng.choice(len(pairs), min(len(pairs), 4), replace=False)]
    table = jnp.asarray(rng.standard_normal((1, *sizes)), jnp.float32)
    dy = rng.standard_normal((len(pairs), np.prod(queries), np.prod(keys))).astype(np.float32)
    at = [entries(apart[pair], queries, keys, sizes) for pair in pairs]
    # What no window holds has no weight.
    dy = np.where(np.stack(at) >= 0, dy, 0)
    origins = [int(kv_code[j] - q_code[i]) for i, j in pairs]
    tiles, dlines = jax.jit(functools.partial(on_the_chip, strip, origins))(table, jnp.asarray(dy))
    flat = np.append(np.asarray(table).reshape(-1), 0)
    np.testing.assert_array_equal(tiles, np.stack([flat[index] for index in at]))
    wanted = np.zeros(flat.size)
    for index, gradients in zip(at, dy, strict=True):
        np.add.at(wanted, index, gradients.astype(np.float64))
    _, transpose = jax.vjp(functools.partial(strips.lines, strip), table)
    (got,) = transpose(jnp.pad(dlines, [(0, 0), (strip.reach, 0)])[None])
    np.testing.assert_allclose(np.asarray(got).reshape(-1), wanted[:-1], atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("queries", "keys", "most", "message"),
    [
        ((24, 8), (16, 24), (0, 0), "blocks are boxes of powers of two with 8 queries at least beyond the first axis"),
        ((128, 4), (4, 128), (0, 0), "8 queries at least"),
        ((8, 16), (128, 1), (0, 0), "as long along the first axis as the queries, the keys must be a multiple of 128"),
        ((8, 16), (8, 16), (10**4, 160), "its numbers take .* MiB on the chip .* and the kernel has 16.0 MiB for them"),
    ],
)
def test_blocks_that_have_no_strip(queries, keys, most, message):
    with pytest.raises(NotImplementedError, match=message):
        Strip(queries, keys, (0, 0), most).check(2**24)
