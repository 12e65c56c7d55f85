"""A stack of blocks against its blocks one by one, and how much of it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.nn import stack
from jattn.nn.drop_path import fold
from jattn.nn.vision_block import VisionBlock

WIDTH, GRID, FIRST = 8, (7, 5), 3


class Neighbor(nnx.Module):
    """What a block needs of an attention, which takes longer to compile: weights, and a structure that may differ."""

    def __init__(self, dilation, rngs):
        self.dilation, self.linear = dilation, nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.linear(jnp.roll(x, self.dilation, axis=(1, 2)))


def blocks(dilations):
    rngs = nnx.Rngs(0)

    def block(dilation):
        return VisionBlock(Neighbor(dilation, rngs), WIDTH, 11, layer_scale=0.5, rngs=rngs)

    return nnx.List([block(dilation) for dilation in dilations])


def one_by_one(modules, x, rates, key):
    for index, (block, rate) in enumerate(zip(modules, rates, strict=True)):
        x = block(x, rate=rate, key=fold(key, FIRST + index))
    return x


def together(modules, x, rates, key):
    return stack.run_blocks(modules, x, rates=rates, key=key, first=FIRST)


@pytest.mark.parametrize(
    ("dilations", "loops", "key"),
    [
        pytest.param((1,) * 5, 1, jax.random.key(5), id="alike, random"),
        pytest.param((1, 2) * 3 + (1,), 1, None, id="in turn, and one more, fixed"),
        pytest.param((1, 2) * 3 + (1,), 1, jax.random.key(5), id="in turn, and one more, random"),
        pytest.param((1, 2, 1, 2), 0, None, id="too few in turn, fixed"),
        pytest.param((1, 2, 2, 1), 0, jax.random.key(5), id="irregular, random"),
        pytest.param((2,), 0, jax.random.key(5), id="one, random"),
    ],
)
def test_a_loop_changes_nothing(dilations, loops, key):
    graph, parameters = nnx.split(blocks(dilations))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, *GRID, WIDTH)), jnp.float32)
    rates = np.linspace(0, 0.5, len(dilations)).tolist()

    def loss(run):
        return lambda parameters, x: jnp.sum(jnp.sin(run(nnx.merge(graph, parameters), x, rates, key)))

    got, want = (jax.jit(jax.value_and_grad(loss(run), (0, 1)))(parameters, x) for run in (together, one_by_one))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    equations = jax.make_jaxpr(loss(together))(parameters, x).jaxpr.eqns
    assert sum(equation.primitive.name == "scan" for equation in equations) == loops


def test_what_is_compiled_does_not_grow():
    def length(count):
        graph, parameters = nnx.split(blocks((1,) * count))
        x = jnp.zeros((1, *GRID, WIDTH))
        run = jax.jit(lambda parameters, x: together(nnx.merge(graph, parameters), x, [0.0] * count, None))
        return run.lower(parameters, x).as_text().count("dot_general")

    assert length(4) == length(9) > 0
