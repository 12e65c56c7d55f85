"""The main job from command to report: its time, its bits per byte, and what compressors need for the same text."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Result

ROOT = Path(__file__).parent.parent


def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "train", "run", "pydoc_lm", "--workdir", folder]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        summary = json.loads((Path(folder) / "summary.json").read_text())
        text = json.loads((Path(folder) / "samples.json").read_text())[0]
    rows = [{"what": "pydoc_lm, held-out text", "bits per byte": summary["val_bits_per_byte"]}]
    rows += [{"what": name, "bits per byte": bits} for name, bits in summary["baselines"].items()]
    return Result(
        f"Main job: {summary['params']:,} parameters, {summary['steps']} steps, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {wall:.0f} s from command to report",
        rows,
        [
            ("seconds from command to sample text and report", wall, 180.0, "at most"),
            ("bits per byte on held-out text", summary["val_bits_per_byte"], 1.60, "at most"),
        ],
        [
            "The compressor with the training text before it finds passages that stand in both again word by word; "
            "the model has to predict them.",
            "sample: " + (text["prompt"] + text["text"])[:300].replace("\n", " "),
        ],
    )
