"""What position-aligned attention costs: products, pairs and memory, counted in the program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jattn import dot_product_attention
from jattn.sparse.pka import pka_attention, pka_pairs
from tests.counting import products
from tests.sparse.test_pka import COMBINE, B, H, M, N, V, make, to_float32


def cost(conditions, image=64, subjects=(), mask=None, **options):
    shapes = jax.eval_shape(
        lambda: to_float32(make(image=image, spatial=conditions, subjects=subjects, keywords=((None, None),)))
    )
    return products(lambda x, mask: pka_attention(x, mask, **options)[0], shapes, mask)


def joint_cost(conditions, image=64):
    tokens = M + image * (1 + conditions)
    shape = jax.ShapeDtypeStruct((B, tokens, N, H), jnp.float32)
    return products(functools.partial(dot_product_attention, implementation="reference"), shape, shape, shape)


@pytest.mark.parametrize("combine", COMBINE)
def test_work_is_linear_in_the_number_of_conditions(combine):
    counts = [cost(c, combine=combine) for c in (0, 1, 2, 4, 8)]
    steps = [(b - counts[0]) / c for b, c in zip(counts[1:], (1, 2, 4, 8), strict=True)]
    assert len(set(steps)) == 1
    assert steps[0] < counts[0] / 50
    full = [joint_cost(c) for c in (4, 8, 16)]
    assert full[1] / full[0] > 3
    assert full[2] / full[1] > 3.4
    assert full[2] / cost(16, combine=combine) > 100


def test_places_are_what_a_subject_costs():
    """16 places of 128 read a subject of 32, in an eighth of the products of all rows."""
    mask = jax.ShapeDtypeStruct((B, 1, 128), jnp.bool_)
    none, every, some = (
        cost(0, 128, s, m, max_tokens=t) for s, m, t in (((), None, None), ((32,), mask, None), ((32,), mask, 16))
    )
    assert (every - none) / (some - none) == pytest.approx(8, rel=0.01)


def test_the_count_of_pairs():
    count = functools.partial(pka_pairs, text=M, image=64)
    per_pair = 2 * (H + V) * B * N
    assert cost(0) == per_pair * count(cached=True)
    assert cost(0, subjects=(32,)) == per_pair * count(subjects=(32,), cached=True)
    assert count(spatial=3, cached=True) - count(cached=True) == 3 * 64
    assert count(spatial=3) - count(spatial=3, cached=True) == 3 * 64**2
    assert count(subjects=(9, 4), selected=(5, 0), cached=True) - count(cached=True) == 45
    with pytest.raises(ValueError, match="selected: expected a number for each of 2 subjects, got 1"):
        count(subjects=(9, 4), selected=(5,))


def test_memory_has_no_logits_of_all_tokens():
    """Eight conditions and a subject: nothing as large as the logits of the reference's one sequence."""
    shapes = jax.eval_shape(
        lambda: to_float32(make(image=256, spatial=8, subjects=(64,), keywords=((None, None),), heads=(2, 2), batch=1))
    )

    def temporary(name):
        def loss(x):
            return jnp.sum(pka_attention(x, combine="joint", implementation=name)[0].image)

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 256 * 256 * 9 * 2 * 4
    assert temporary("reference") > logits
    assert temporary("xla") < logits / 2
