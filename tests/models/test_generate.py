"""Sampling: filters against NumPy, agreement with the parallel forward, ragged prompts, stops, streaming, errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.generate import filter_logits, generate
from tests.models.test_lm import make


@pytest.fixture(scope="module")
def model():
    return make()


def test_greedy_is_the_argmax_of_the_parallel_forward(model):
    prompt = [3, 1, 4, 1, 5]
    (new,) = generate(model, [prompt], max_new_tokens=9, temperature=0)
    logits, _ = model(jnp.asarray([prompt + new]))
    assert new == [int(token) for token in jnp.argmax(logits[0, 4:-1], -1)]
    assert len(new) == 9


def test_rows_do_not_depend_on_one_another(model):
    """Prompts of different lengths in one batch give what each gives alone."""
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    together = generate(model, prompts, max_new_tokens=7, seed=11)
    assert together[0] == generate(model, prompts[:1], max_new_tokens=7, seed=11)[0]
    assert [len(row) for row in together] == [7, 7, 7]
    greedy = generate(model, prompts, max_new_tokens=7, temperature=0)
    assert greedy == [generate(model, [prompt], max_new_tokens=7, temperature=0)[0] for prompt in prompts]


def test_seeds(model):
    first, again, other = (generate(model, [[1, 2]], max_new_tokens=12, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_stop_tokens_and_streaming(model):
    (free,) = generate(model, [[1, 2, 3]], max_new_tokens=12, seed=4)
    stop = free[5]
    seen = []
    (stopped,) = generate(
        model, [[1, 2, 3]], max_new_tokens=12, seed=4, stop_tokens=[stop], on_token=lambda t: seen.append(int(t[0]))
    )
    assert stopped == free[: free.index(stop) + 1]
    assert seen == stopped


def test_sampling_follows_the_distribution(model):
    """The frequencies of the first token over many rows are the model's probabilities."""
    rows = 2000
    new = generate(model, [[7]] * rows, max_new_tokens=1, temperature=1.3)
    logits, _ = model(jnp.asarray([[7]]))
    expected = np.exp(np.asarray(logits[0, 0]) / 1.3)
    expected /= expected.sum()
    counted = np.bincount([row[0] for row in new], minlength=17) / rows
    assert np.abs(counted - expected).max() < 4 * np.sqrt(0.25 / rows)


def kept(**options):
    logits = jnp.log(jnp.asarray([[0.4, 0.05, 0.3, 0.05, 0.2]]))
    return np.flatnonzero(np.isfinite(filter_logits(logits, **options)[0])).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [0]),
        ({"top_p": 0.69}, [0, 2]),
        ({"top_p": 0.75}, [0, 2, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.6}, [0, 2]),
        ({"min_p": 0.45}, [0, 2, 4]),
        ({"top_k": 3, "top_p": 0.7}, [0, 2]),
        ({"temperature": 0.5, "top_p": 0.7}, [0, 2]),
    ],
)
def test_filters(options, expected):
    assert kept(**options) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompts: expected at least one prompt and no empty one"),
        ({"prompts": []}, "prompts: expected at least one prompt"),
        ({"prompts": [[17]]}, r"prompts: ids must lie in \[0, 17\), got one from 17 to 17"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1}, "temperature: expected a number of at least 0, got -1"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected a fraction in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, r"min_p: expected a fraction in \(0, 1\], got 1.5"),
    ],
)
def test_errors(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompts": [[1]], "max_new_tokens": 3} | change))


@pytest.mark.parametrize("prompts", [["The"], list(b"The"), "The", [[1.5]], np.ones((1, 2)), None])
def test_prompts_are_rows_of_ids(model, prompts):
    with pytest.raises(TypeError, match=r"prompts: expected rows of token ids.*\[list\(b'The '\)\]"):
        generate(model, prompts, max_new_tokens=3)
