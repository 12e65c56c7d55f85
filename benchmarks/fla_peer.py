"""flash-linear-attention's Triton kernels on the operands of `linear_gpu`, where they and PyTorch are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

_NAMES = {"query": "q", "key": "k", "value": "v", "beta": "beta", "scalar": "g", "channel": "g"}
"""What it calls our operands."""


def missing() -> str | None:
    """Why there is nothing to measure beside, if so."""
    absent = [name for name in ("torch", "triton", "fla") if importlib.util.find_spec(name) is None]
    return f"flash-linear-attention: {', '.join(absent)} not installed" if absent else None


def version() -> str:
    import fla
    import torch

    return f"flash-linear-attention {fla.__version__}, torch {torch.__version__}"


class Peer:
    """One form's kernels. The arrays are copied once; nothing passes between the libraries while they are timed."""

    def __init__(self, form: str, operands: Mapping[str, jax.Array], cotangent: jax.Array, scale: float) -> None:
        import torch
        from fla import ops

        function = {
            "simple GLA": ops.chunk_simple_gla,
            "GLA": ops.chunk_gla,
            "gated delta rule": ops.chunk_gated_delta_rule,
            "KDA": ops.chunk_kda,
        }[form]
        self._torch, self._scale = torch, scale
        self._function: Callable[..., Any] = function
        self._operands = {_NAMES[name]: self._tensor(x).requires_grad_() for name, x in operands.items()}
        self._cotangent = self._tensor(cotangent)

    def _tensor(self, x: jax.Array) -> Any:
        return self._torch.from_dlpack(x).clone()

    def _out(self) -> Any:
        return self._function(**self._operands, scale=self._scale)[0]

    def forward(self) -> Any:
        with self._torch.no_grad():
            return self._out()

    def both(self) -> Any:
        return self._torch.autograd.grad(self._out(), list(self._operands.values()), self._cotangent)

    def wait(self, _: Any) -> None:
        self._torch.cuda.synchronize()

    def outputs(self) -> np.ndarray:
        return self.forward().float().cpu().numpy()
