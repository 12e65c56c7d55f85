"""Is blockwise softmax attention as fast as `jax.nn.dot_product_attention` on this machine, and in how much memory?"""

from __future__ import annotations

import jax

from benchmarks.measure import Result, interleaved, median, ratio, temporary_bytes
from jattn import dot_product_attention


def run() -> Result:
    rows, targets = [], []
    for length, heads, width in ((2048, 8, 64), (4096, 8, 64), (4096, 4, 32)):
        for causal in (False, True):
            shape = (1, length, heads, width)
            arrays = [jax.random.normal(jax.random.key(i), shape) for i in range(4)]
            gradients = {}
            for name, attend in (("ours", dot_product_attention), ("jax.nn", jax.nn.dot_product_attention)):

                def loss(q, k, v, do, attend=attend, causal=causal):
                    return (attend(q, k, v, is_causal=causal) * do).sum()

                gradients[name] = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
            calls = {name: lambda f=f, arrays=arrays: f(*arrays) for name, f in gradients.items()}
            seconds = interleaved(calls, rounds=5)
            memory = {name: temporary_bytes(f, *arrays) / 1e6 for name, f in gradients.items()}
            rows.append(
                {
                    "T": length,
                    "N x H": f"{heads} x {width}",
                    "mask": "causal" if causal else "none",
                    "jax.nn, ms": 1e3 * median(seconds, "jax.nn"),
                    "ours, ms": 1e3 * median(seconds, "ours"),
                    "ours / jax.nn": ratio(seconds, "ours", "jax.nn"),
                    "jax.nn, MB": memory["jax.nn"],
                    "ours, MB": memory["ours"],
                }
            )
            if length == 4096:
                what = f"time over jax.nn's, T {length}, {heads} x {width}, {rows[-1]['mask']}"
                targets.append((what, rows[-1]["ours / jax.nn"], 1.2, "at most"))
    return Result("Softmax attention, forward + backward, float32", rows, targets)
