"""Sampling text from a language model, one token at a time, in memory that its mixers bound.

Logits pass, in this order, through temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020) and min-p
(Nguyen et al. 2024) before a token is drawn.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.models.lm import LM, LMState


def filter_logits(
    logits: Float[Array, "B vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Array, "B vocab"]:
    """Logits divided by the temperature, with `-inf` at every token that a filter removes.

    Args:
      temperature: above 0.
      top_k: keep the k largest (ties with the k-th stay).
      top_p: keep the smallest set of largest tokens whose probability reaches p.
      min_p: keep tokens at least this fraction as probable as the likeliest.
    """
    logits = logits / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p is not None:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(min_p), -jnp.inf, logits)
    return logits


def generate(
    model: LM,
    prompts: Sequence[Sequence[int]] | Int[Array, "B P"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    on_token: Callable[[np.ndarray], Any] | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
      model: the model; its weights are read, not changed.
      prompts: token ids, one sequence per row; lengths may differ, none may be empty.
      max_new_tokens: at most so many tokens are added to each.
      temperature: 0 takes the likeliest token every time; the filters then change nothing.
      top_k, top_p, min_p: see `filter_logits`; `None` switches a filter off.
      seed: the same seed, prompts and options give the same text, and a row's text does not depend on the other rows.
      stop_tokens: a row ends with the first of these, which is kept.
      on_token: called after every step with an `[B]` array of the new token of each row, -1 where there is none.

    Returns:
      the new tokens of each row, without the prompt.

    Raises:
      TypeError: prompts that are no rows of integers.
      ValueError: an empty prompt, an id outside the vocabulary, an option outside its range.
    """
    try:
        given = np.asarray(prompts).tolist() if hasattr(prompts, "shape") else prompts
        rows = [list(map(operator.index, row)) for row in given]
    except TypeError:
        raise TypeError(
            "prompts: expected rows of token ids, one or more, such as [list(b'The ')] for a model of bytes; encode "
            "text first"
        ) from None
    _check_options(model, rows, max_new_tokens, temperature, top_k, top_p, min_p)
    options = (float(temperature), top_k, top_p, min_p)
    lengths = np.array([len(row) for row in rows])
    longest, shortest = int(lengths.max()), int(lengths.min())
    padded = np.zeros((len(rows), longest), np.int32)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row

    graph, weights = nnx.split(model)
    state = model.init_state(len(rows), longest + max_new_tokens)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(rows)))
    logits, state = _read(graph, weights, jnp.asarray(padded[:, :shortest]), state)

    stops = np.asarray(list(stop_tokens), np.int32)
    new: list[list[int]] = [[] for _ in rows]
    done = np.zeros(len(rows), bool)
    for position in range(shortest, longest + max_new_tokens):
        # Rows with longer prompts are still reading theirs while the others already write.
        drawn = np.asarray(_draw(logits, keys, position - lengths, options))
        reading = position < lengths
        writing = ~reading & ~done & (position < lengths + max_new_tokens)
        tokens = np.where(reading, padded[:, min(position, longest - 1)], drawn)
        for index in np.flatnonzero(writing).tolist():
            new[index].append(int(tokens[index]))
        done |= writing & np.isin(tokens, stops)
        done |= position + 1 >= lengths + max_new_tokens
        if on_token is not None and writing.any():
            on_token(np.where(writing, tokens, -1))
        if done.all():
            break
        logits, state = _read(graph, weights, jnp.asarray(tokens, jnp.int32)[:, None], state)
    return new


def _check_options(
    model: LM,
    rows: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    checks.check_count("max_new_tokens", max_new_tokens)
    if not rows or not all(rows):
        raise ValueError("prompts: expected at least one prompt and no empty one; start from a newline if need be")
    vocabulary = model.config.vocab_size
    for row in rows:
        if min(row) < 0 or max(row) >= vocabulary:
            raise ValueError(f"prompts: ids must lie in [0, {vocabulary}), got one from {min(row)} to {max(row)}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    if top_k is not None:
        checks.check_count("top_k", top_k)
    for name, fraction in (("top_p", top_p), ("min_p", min_p)):
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"{name}: expected a fraction in (0, 1], got {fraction}")


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(graph: Any, weights: Any, tokens: Int[Array, "B T"], state: LMState) -> tuple[Array, LMState]:
    """The logits after the last token, and the state there: prefill for many tokens, a decode step for one."""
    model = nnx.merge(graph, weights)
    hidden, state = model.hidden(tokens, state=state)
    return model.logits(hidden[:, -1:])[:, 0], state


@partial(jax.jit, static_argnums=3)
def _draw(
    logits: Float[Array, "B vocab"], keys: Array, index: Int[Array, " B"], options: tuple[Any, ...]
) -> Int[Array, " B"]:
    """One token for every row, from the row's own key and the index of the token within the row."""
    temperature, top_k, top_p, min_p = options
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.maximum(index, 0))
    return jax.vmap(jax.random.categorical)(keys, logits)
