"""Does the hybrid learn as well as softmax attention of the same size, data and number of steps?"""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from benchmarks.measure import Result
from benchmarks.models import HYBRID, SOFTMAX
from jattn.models.lm import LMConfig, count_parameters
from train.data.pipeline import TrainData
from train.data.sources import read_documents, split_by_document
from train.evaluate import bits_per_byte, place
from train.recipes import pydoc_lm
from train.schedule import factor
from train.sharding import make_mesh
from train.step import make_program, resolve_precision

STEPS = 250
SEEDS = (0,)


def train(model: LMConfig, seed: int) -> tuple[int, float, float]:
    """Parameters, bits per byte on held-out text, and seconds of training."""
    config = resolve_precision(dataclasses.replace(pydoc_lm.config(), model=model, seed=seed))
    training, held_out = split_by_document(read_documents(config.data.source), config.data.holdout)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = program.init(seed)
    start = time.perf_counter()
    with TrainData(training, config.data.context, config.data.batch, seed).iterator() as batches:
        for step in range(STEPS):
            rate = np.float32(factor(config.schedule, step / STEPS))
            state, _ = program.step(state, place(next(batches), program), rate)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    bits = bits_per_byte(program, state.parameters, held_out, config.data)
    return count_parameters(program.model(state.parameters)), bits, seconds


def run() -> Result:
    # Softmax has no gate of its own; its MLP takes up what the hybrid's gates have in parameters.
    models = {"hybrid": HYBRID, "softmax": dataclasses.replace(SOFTMAX, mlp_width=HYBRID.mlp_width + HYBRID.width // 6)}
    rows, means = [], {}
    for name, model in models.items():
        results = [train(model, seed) for seed in SEEDS]
        means[name] = sum(bits for _, bits, _ in results) / len(results)
        row = {"model": name, "parameters": results[0][0], "bits per byte": means[name]}
        for seed, (_, bits, _) in zip(SEEDS, results, strict=True):
            row[f"seed {seed}"] = bits
        rows.append({**row, "seconds": sum(seconds for _, _, seconds in results)})
    return Result(
        f"Recipe pydoc_lm, {STEPS} steps, context {pydoc_lm.config().data.context}, held-out text",
        rows,
        [("bits per byte of the hybrid over softmax", means["hybrid"] / means["softmax"], 1.02, "at most")],
    )
