"""Steps that go wrong: updates that are not finite, and losses that spike.

    z = (loss - mean) / deviation  over the last W finite losses;  a spike is z > limit, once W losses are known

The step itself skips an update that is not finite. Several in a row stop the run. After a spike the run goes back to
its last checkpoint and leaves out the batches since then (Chowdhery et al. 2022, section 5.1). The losses are a part of
the checkpoint, so that a run that was interrupted sees the same spikes.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal

from train.config import GuardConfig

Verdict = Literal["fine", "spike", "broken"]

_LEAST_DEVIATION = 1e-3
"""Of the mean: losses that hardly vary would make a spike of every wobble."""


class Guard:
    """Judges each step by its loss, in order."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.losses: collections.deque[float] = collections.deque(maxlen=config.spike_window)
        self._nonfinite = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """ "broken" once `max_nonfinite` steps in a row were not finite, "spike" by the rule above, else "fine"."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._nonfinite += 1
            return "broken" if self._nonfinite >= self._config.max_nonfinite else "fine"
        self._nonfinite = 0
        if self._is_spike(loss):
            return "spike"
        self.losses.append(loss)
        return "fine"

    def _is_spike(self, loss: float) -> bool:
        limit = self._config.spike_z
        if limit is None or len(self.losses) < self._config.spike_window:
            return False
        mean = statistics.fmean(self.losses)
        deviation = max(statistics.pstdev(self.losses, mean), _LEAST_DEVIATION * abs(mean))
        return loss > mean + limit * deviation

    def get_state(self) -> dict[str, Any]:
        """JSON."""
        return {"losses": list(self.losses), "nonfinite": self._nonfinite}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `get_state`."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self._nonfinite = state["nonfinite"]
