"""What do the linear recurrences cost on this machine, and how do they grow with the length? XLA paths, one layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Result, interleaved, keep_memory, median, ratio
from jattn import delta_rule, linear_attention

LENGTHS = (2048, 4096, 8192, 16384, 32768)
HEADS, WIDTH = 4, 64


def run() -> Result:
    keep_memory()
    calls: dict[str, Callable[[], Any]] = {}
    for length in LENGTHS:
        calls |= {f"{name} {length}": call for name, call in _calls(length).items()}
    # Softmax gives gigabytes back to the system, and the next call pays for it: it takes turns with one other.
    softmax = calls.pop(f"softmax {LENGTHS[2]}")
    seconds = interleaved(calls, rounds=11, warmup=2)
    pair = interleaved({"scalar": calls[f"scalar {LENGTHS[2]}"], "softmax": softmax}, rounds=3)
    names = list(dict.fromkeys(key.split(" ")[0] for key in calls))
    rows = [
        {"T": length}
        | {f"{n}, ms": 1e3 * median(seconds, f"{n} {length}") if f"{n} {length}" in calls else "-" for n in names}
        for length in LENGTHS
    ]
    growth = {
        f"{name}, T {long} over {short}": ratio(seconds, f"{name} {long}", f"{name} {short}")
        for name in ("scalar", "channel", "gated-delta")
        for short, long in itertools.pairwise(LENGTHS)
    }
    middle = LENGTHS[2]
    return Result(
        f"Forward + backward, batch 1, {HEADS} heads of {WIDTH}, float32",
        rows,
        [
            *((f"time of {what}", value, 2.1, "at most") for what, value in growth.items()),
            (
                f"XLA softmax over scalar, T {middle}",
                ratio(pair, "softmax", "scalar"),
                5.0,
                "at least",
            ),
            (
                f"channel over scalar, T {middle}",
                ratio(seconds, f"channel {middle}", f"scalar {middle}"),
                2.5,
                "at most",
            ),
            (
                f"gated delta over scalar, T {middle}",
                ratio(seconds, f"gated-delta {middle}", f"scalar {middle}"),
                2.5,
                "at most",
            ),
        ],
        ["Memory that calls free is kept; otherwise the system clears 70 MB of pages at every call of T 16384."],
    )


def _calls(length: int) -> dict[str, Callable[[], Any]]:
    query, key, value, cotangent = (jax.random.normal(jax.random.key(i), (1, length, HEADS, WIDTH)) for i in range(4))
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    gates = {
        "scalar": -0.1 * jax.random.uniform(jax.random.key(5), (1, length, HEADS)),
        "channel": -0.1 * jax.random.uniform(jax.random.key(6), (1, length, HEADS, WIDTH)),
    }
    beta = jax.random.uniform(jax.random.key(7), (1, length, HEADS))

    def both(op: Callable[..., Any], *more: Any) -> Callable[[], Any]:
        def loss(*operands: Any) -> Any:
            return jnp.sum(op(*operands) * cotangent)

        operands = (query, key, value, *more)
        step = jax.jit(jax.value_and_grad(loss, tuple(range(len(operands)))))
        return lambda: step(*operands)

    found = {name: both(linear_attention, gate) for name, gate in gates.items()}
    found["gated-delta"] = both(delta_rule, beta, gates["scalar"])
    if length == LENGTHS[2]:
        found["softmax"] = both(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    return found
