"""The sliced cross-entropy against optax, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattn.nn.cross_entropy import chunked_cross_entropy


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, 11, (3, 7)))


@pytest.mark.parametrize("chunk_size", [1, 4, 21, None])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_equals_optax_with_gradients(arrays, chunk_size, soft_cap):
    hidden, head, targets = arrays

    def dense(hidden, head):
        logits = hidden @ head
        logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def sliced(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, soft_cap=soft_cap, chunk_size=chunk_size)

    np.testing.assert_allclose(sliced(hidden, head), dense(hidden, head), atol=2e-6)
    weights = jnp.arange(21.0).reshape(3, 7)
    for ours, theirs in zip(
        jax.grad(lambda *x: (sliced(*x) * weights).sum(), (0, 1))(hidden, head),
        jax.grad(lambda *x: (dense(*x) * weights).sum(), (0, 1))(hidden, head),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    vocabulary = 128_000

    def temporary(tokens):
        shapes = (
            jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
            jax.ShapeDtypeStruct((8, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        )
        step = jax.jit(jax.grad(lambda x, w, y: chunked_cross_entropy(x, w, y).sum(), (0, 1)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(512), temporary(2048)
    # The logits of the larger call alone would be a gigabyte.
    assert large < 2048 * vocabulary * 4 / 8
    assert large - small < 1536 * vocabulary * 4 / 100


def test_errors(arrays):
    hidden, head, targets = arrays
    with pytest.raises(ValueError, match=r"head: expected \[D, vocab\] with D = 5 as in hidden, got \(11, 5\)"):
        chunked_cross_entropy(hidden, head.T, targets)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        chunked_cross_entropy(hidden, head, targets, chunk_size=0)
    with pytest.raises(TypeError, match="targets: expected an integer dtype"):
        chunked_cross_entropy(hidden, head, targets.astype(jnp.float32))
