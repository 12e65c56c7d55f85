"""What does a longer context cost? The hybrid of the main job beside softmax models of the same size."""

from __future__ import annotations

import jax

from benchmarks.measure import Result, interleaved, median, ratio, temporary_bytes
from benchmarks.models import HYBRID, SOFTMAX, loss_and_gradient, random_tokens

LENGTHS = (2048, 4096, 8192, 16384)


def run() -> Result:
    models = {
        "hybrid": loss_and_gradient(HYBRID),
        "softmax, ours": loss_and_gradient(SOFTMAX),
        "softmax, XLA": loss_and_gradient(SOFTMAX, plain=True),
    }
    rows, ratios = [], {}
    steps = {name: jax.jit(f) for name, (f, _) in models.items()}
    for length in LENGTHS:
        tokens = random_tokens(length)
        # Plain softmax holds T x T scores of every head: beyond 8192 they no longer fit a small machine.
        names = [name for name in models if length <= 8192 or name != "softmax, XLA"]
        calls = {name: lambda name=name, tokens=tokens: steps[name](models[name][1], tokens) for name in names}
        seconds = interleaved(calls, rounds=5 if length <= 4096 else 3)
        row = {"T": length}
        for name in models:
            row[f"{name}, ms"] = 1e3 * median(seconds, name) if name in names else "-"
        for name in models:
            row[f"{name}, MB"] = (
                temporary_bytes(models[name][0], models[name][1], tokens) / 1e6 if name in names else "-"
            )
        rows.append(row)
        for name in names[1:]:
            ratios[length, name] = ratio(seconds, name, "hybrid")

    # The figure with a target is measured by itself, the two lengths taking turns.
    weights = models["hybrid"][1]
    short, long = random_tokens(2048), random_tokens(16384)
    turns = interleaved(
        {"2048": lambda: steps["hybrid"](weights, short), "16384": lambda: steps["hybrid"](weights, long)}, rounds=5
    )
    memory = rows[-1]["hybrid, MB"] / rows[0]["hybrid, MB"]
    return Result(
        "Forward + backward of a 0.8 M parameter model, batch 1",
        rows,
        [
            ("hybrid: time at T 16384 over T 2048", ratio(turns, "16384", "2048"), 9.0, "at most"),
            ("hybrid: temporary memory at T 16384 over T 2048", memory, 9.0, "at most"),
            ("plain XLA softmax over hybrid, T 2048", ratios[2048, "softmax, XLA"], 2.5, "at least"),
            ("plain XLA softmax over hybrid, T 8192", ratios[8192, "softmax, XLA"], 8.0, "at least"),
        ],
        [
            f"our blockwise softmax over hybrid: {ratios[2048, 'softmax, ours']:.2f} at T 2048, "
            f"{ratios[8192, 'softmax, ours']:.2f} at T 8192, {ratios[16384, 'softmax, ours']:.2f} at T 16384",
        ],
    )
