"""NATTEN's own test matrix: XLA and interpreted kernels against the dense definition, with gradients.

NATTEN allows 1e-4 in float32, and 1e-2 for the gradient of queries.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from jattn.neighborhood.neighborhood import neighborhood_attention

# Lengths, windows, strides of 1, half a window and a window, dilations, causal or not: every pair of values of any two
# of these that fits occurs once.
LINES = [
    (125, 3, 1, 1, False),
    (125, 8, 4, 5, True),
    (125, 8, 8, 10, False),
    (125, 15, 15, 1, True),
    (125, 61, 1, 1, False),
    (128, 3, 3, 10, True),
    (128, 8, 1, 1, False),
    (128, 15, 1, 5, False),
    (128, 61, 30, 1, False),
    (256, 3, 1, 5, False),
    (256, 8, 1, 1, False),
    (256, 15, 7, 10, False),
    (256, 61, 1, 1, True),
    (256, 255, 255, 1, False),
    (2048, 3, 1, 1, False),
    (2048, 8, 1, 10, False),
    (2048, 15, 1, 1, False),
    (2048, 61, 1, 10, False),
    (2048, 61, 61, 5, False),
    (2048, 255, 1, 5, False),
    (2048, 255, 127, 1, True),
]
PLANES = [
    ((5, 25), (5, 16), (1, 16), (1, 1)),
    ((84, 19), (7, 3), (3, 1), (5, 1)),
    ((67, 80), (12, 7), (8, 4), (5, 11)),
]
VOLUME = ((13, 11, 9), (3, 4, 3), (2, 3, 3), (3, 2, 2))
# NATTEN's last axis is 12 long, of which the dense definition takes most of a minute.
LARGE_WINDOWS = ((18, 37, 4), (14, 16, 4), (12, 8, 1), (1, 2, 1), (False, True, True))
HEADS, WIDTH = 1, 8

either = (False, True)
# Every axis is causal and is not; two axes are so in every combination: in one plane or another, and in the volume.
planes = [(*plane, (a, a ^ either[i % 2])) for i, plane in enumerate(PLANES) for a in either]
volumes = [(*VOLUME, (a, b, a ^ b)) for a, b in itertools.product(either, repeat=2)]
MATRIX = [((length,), *rest) for length, *rest in LINES] + planes + volumes + [LARGE_WINDOWS]


@pytest.mark.parametrize(("grid", "window", "stride", "dilation", "is_causal"), MATRIX)
def test_implementations_agree(grid, window, stride, dilation, is_causal):
    rng = np.random.default_rng(sum(grid))
    value_width = int(rng.integers(1, 5)) * 8
    widths = {"query": WIDTH, "key": WIDTH, "value": value_width}
    x = {name: rng.standard_normal((1, *grid, HEADS, width)).astype(np.float32) for name, width in widths.items()}
    d_out = 0.05 * rng.standard_normal((1, *grid, HEADS, value_width)).astype(np.float32)
    options = {"kernel_size": window, "stride": stride, "dilation": dilation, "is_causal": is_causal}

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, x):
        attend = functools.partial(neighborhood_attention, **options, implementation=name)
        out, pull_back = jax.vjp(lambda x: attend(**x), x)
        return out, pull_back(d_out)

    want = run("reference", x)
    for name in ("xla", "interpret"):
        for a, b in zip(*map(jax.tree.leaves, (run(name, x), want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6, err_msg=name)
