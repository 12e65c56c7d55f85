"""Does the loss over a large vocabulary need memory for tokens x vocabulary?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from benchmarks.measure import Result, temporary_bytes
from jattn.nn.cross_entropy import chunked_cross_entropy

VOCABULARY, WIDTH = 128_000, 64


def dense(hidden, head, targets):
    return optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("btd,dv->btv", hidden, head), targets)


def run() -> Result:
    rows = []
    for tokens in (1024, 4096, 16384):
        shapes = (
            jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((WIDTH, VOCABULARY), jnp.float32),
            jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        )
        row = {"tokens": tokens, "logits alone, MB": tokens * VOCABULARY * 4 / 1e6}
        for name, loss in (("dense, MB", dense), ("chunked, MB", chunked_cross_entropy)):
            gradient = jax.grad(lambda x, w, y, loss=loss: loss(x, w, y).sum(), (0, 1))
            row[name] = temporary_bytes(gradient, *shapes) / 1e6
        rows.append(row)
    growth = (rows[-1]["chunked, MB"] - rows[0]["chunked, MB"]) / (
        rows[-1]["logits alone, MB"] - rows[0]["logits alone, MB"]
    )
    return Result(
        f"Temporary memory of the loss and its gradients, vocabulary {VOCABULARY:,}",
        rows,
        [("growth of chunked memory over growth of the logits", growth, 0.01, "at most")],
    )
