"""The pre-norm residual block: x + mixer(norm(x)), then x + mlp(norm(x)) if there is an mlp."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.nn.mixer import Mixer, State
from jattn.nn.mlp import MLP, SwiGLU


def make_norm(kind: str, width: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> Any:
    """An `nnx.RMSNorm` ("rmsnorm") or `nnx.LayerNorm` ("layernorm") over `width` channels."""
    checks.check_choice("norm", kind, ("rmsnorm", "layernorm"))
    layer = nnx.RMSNorm if kind == "rmsnorm" else nnx.LayerNorm
    return layer(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def make_mlp(kind: str, width: int, hidden: int, **settings: Any) -> SwiGLU | MLP | None:
    """A `SwiGLU` ("swiglu"), an `MLP` ("gelu") or `None` ("none")."""
    checks.check_choice("mlp", kind, ("swiglu", "gelu", "none"))
    if kind == "none":
        return None
    return (SwiGLU if kind == "swiglu" else MLP)(width, hidden, **settings)


class Block(nnx.Module):
    """One layer of a transformer around any mixer.

    Args:
      mixer: the token mixer.
      mlp: the channel mixer; `None` for none.
      mixer_norm, mlp_norm: what each reads through.
    """

    def __init__(
        self, mixer: Mixer, mlp: SwiGLU | MLP | None, mixer_norm: nnx.Module, mlp_norm: nnx.Module | None = None
    ):
        self.mixer: Any = mixer
        self.mlp = mlp
        self.mixer_norm: Any = mixer_norm
        self.mlp_norm: Any = mlp_norm

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        mixed, state = self.mixer(self.mixer_norm(x), positions=positions, segment_ids=segment_ids, state=state)
        x = x + mixed
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x)), state

    def flops(self, batch: int, length: int) -> float:
        mlp = 0.0 if self.mlp is None else self.mlp.flops(batch * length)
        return self.mixer.flops(batch, length) + mlp
