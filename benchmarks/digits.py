"""Which backbone reads digits best with the same parameters and steps? Recipe digits_nat, five folds of all 1,797 scans.

Half an hour of runs in runs/benchmark_digits, which go on where they were stopped; the curves are kept as a picture.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.measure import RESULTS, Result
from train.compare import compare
from train.config import load_models, load_recipe
