"""Mamba-2's block against its equations, token by token, and against the sizes of the released models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models import LM, LMConfig
from jattn.nn import Mamba2Mixer

B, T, D, N, G, P, n = 2, 13, 10, 6, 2, 3, 5
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


def weights(module: nnx.Module) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64) for path, x in leaves}


def silu(x):
    return x / (1 + np.exp(-x))


def recurrence(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The released module's slow path (`Mamba2.step`), with its own names."""

    def convolved(name: str) -> np.ndarray:
        taps, bias = w[f"convolutions/{name}/kernel"], w[f"convolutions/{name}/bias"]
        inputs = np.pad(x @ w[f"projections/{name}/kernel"], [(0, 0), (len(taps) - 1, 0), (0, 0)])
        return silu(sum(taps[d] * inputs[:, len(taps) - 1 - d :][:, :T] for d in range(len(taps))) + bias)

    u, of_keys, of_queries = convolved("value"), convolved("key"), convolved("query")
    u = u.reshape(B, T, N, P)
    of_keys, of_queries = (a.reshape(B, T, G, n) for a in (of_keys, of_queries))
    dt = np.log1p(np.exp(x @ w["decay/up/kernel"] + w["decay/up/bias"]))
    A = -np.exp(w["decay/log_rate"])
    state, y = np.zeros((B, N, P, n)), np.zeros((B, T, N, P))
    for t in range(T):
        for head in range(N):
            group = head // (N // G)
            written = dt[:, t, head, None, None] * u[:, t, head, :, None] * of_keys[:, t, group, None, :]
            state[:, head] = np.exp(dt[:, t, head] * A[head])[:, None, None] * state[:, head] + written
            read = np.einsum("bpn,bn->bp", state[:, head], of_queries[:, t, group])
            y[:, t, head] = read + w["D"][head] * u[:, t, head]
    gated = (y.reshape(B, T, -1) * silu(x @ w["gate/up/kernel"])).reshape(B, T, G, -1)
    normal = gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + 1e-5)
    return (normal.reshape(B, T, -1) * w["norm_scale"]) @ w["projections/out/kernel"]


def test_the_block_is_its_recurrence():
    sizes = {"num_heads": N, "num_kv_heads": G, "head_dim": P, "state_dim": n}
    mixer = Mamba2Mixer(D, **sizes, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = nnx.state(mixer, nnx.Param)
    nnx.update(mixer, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), state))
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    want = recurrence(weights(mixer), x.astype(np.float64))
    assert np.abs(want).max() > 1
    out, _ = mixer(jnp.asarray(x), positions=POSITIONS)
    np.testing.assert_allclose(out, want, atol=2e-5 * np.abs(want).max())


def test_a_language_model_has_as_many_parameters_as_the_released_one():
    """mamba2-130m: 24 layers of 768, heads of 64, tied embedding of 50,288 rows."""
    config = LMConfig(
        vocab_size=50288, width=768, num_layers=24, pattern=("mamba2",), num_heads=24, mlp="none", tied=True
    )
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 128_989_632


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": P, "state_dim": 0}, "state_dim: expected at least 1, got 0"),
        ({"num_kv_heads": 4}, "6 heads cannot be shared by 4"),
        ({"num_heads": 7}, "num_heads: a width of 10 does not divide by 7 heads, nor does its double"),
        ({"head_dim": 0}, "head_dim: expected at least 1, got 0"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Mixer(D, **{"num_heads": N, **options}, rngs=nnx.Rngs(0))
