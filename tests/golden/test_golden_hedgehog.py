"""The adapter of `hedgehog` on files of other shapes, cases and options, made in float64 from the definition."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden.harness import run, systems


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _phi(x, weight, bias, activation, eps):
    """Features [B, T, M, 2 F] of x [B, T, K, H]; map m of M reads head m // (M / K)."""
    x = np.repeat(x, weight.shape[0] // x.shape[2], axis=2)
    u = np.einsum("btmh,mhf->btmf", x, weight) + bias
    if activation == "softmax_joint":
        return _softmax(np.concatenate([2 * u, -2 * u], axis=-1))
    if activation == "exp":
        return np.exp(np.concatenate([u, -u], axis=-1))
    if activation == "softmax_dim":
        halves = [_softmax(u), _softmax(-u)]
    else:
        halves = [np.exp(u - u.max(-1, keepdims=True)), np.exp(-u + u.min(-1, keepdims=True))]
    return np.maximum(np.concatenate(halves, axis=-1), eps)


def _layer(x, is_causal, activation, eps):
    """Weights, outputs and losses of one layer."""
    heads = x["q"].shape[2]
    k, v = (np.repeat(x[name], heads // x[name].shape[2], axis=2) for name in "kv")
    allowed = np.tri(x["q"].shape[1], dtype=bool) if is_causal else True
    logits = np.einsum("btnh,bsnh->bnts", x["q"], k) * k.shape[-1] ** -0.5
    true = _softmax(np.where(allowed, logits, -np.inf))
    phi_q, phi_k = (_phi(x[of], x["W" + of], x.get("b" + of, 0.0), activation, 1e-12) for of in "qk")
    phi_k = np.repeat(phi_k, heads // phi_k.shape[2], axis=2)
    scores = np.where(allowed, np.einsum("btnf,bsnf->bnts", phi_q, phi_k), 0)
    pred = scores / (scores.sum(-1, keepdims=True) + eps)
    y_true, y_pred = (np.einsum("bnts,bsnv->btnv", a, v) for a in (true, pred))
    xent = -(true * np.log(np.maximum(pred, 1e-12))).sum(-1).mean()
    made = {"attn_true": true, "attn_pred": pred, "y_true": y_true, "y_pred": y_pred, "y_linear": y_pred}
    return made | {"loss_xent": xent, "loss_mse": ((y_pred - y_true) ** 2).mean()}


def _gradient(x, name, loss):
    """Of `loss(x)` with respect to x[name], by central differences."""
    gradient, step = np.zeros(x[name].shape), 1e-5
    for index in np.ndindex(*gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = x[name].copy()
            moved[index] += sign * step
            ends.append(loss({**x, name: moved}))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def _write(path, rng, *, shape, cases, config, biased=False, gradients=()):
    """A file with `shape` = B, T, N, K, H, F, V and M maps of keys; `cases` are prefixes."""
    b, t, n, k, h, f, v, m = shape
    eps, activation = config.get("eps", 1e-12), config.get("activation", "softmax_dim")
    arrays = {}
    for case in cases:
        x = {"q": rng.standard_normal((b, t, n, h)), "k": rng.standard_normal((b, t, k, h))}
        x["v"] = rng.standard_normal((b, t, k, v))
        x |= {"Wq": 0.7 * rng.standard_normal((n, h, f)), "Wk": 0.7 * rng.standard_normal((m, h, f))}
        if biased:
            x |= {"bq": rng.standard_normal((n, f)), "bk": rng.standard_normal((m, f))}
        x = {name: array.astype(np.float32).astype(np.float64) for name, array in x.items()}
        made = dict(x)
        for of in "qk":
            for kind in ("softmax_dim", "exp_dim", "exp", "softmax_joint"):
                made[f"phi_{of}_{kind}"] = _phi(x[of], x["W" + of], x.get("b" + of, 0.0), kind, eps)
                made[f"phi_{of}_{kind}_half"] = made[f"phi_{of}_{kind}"][..., :f]
        temp, identity = np.float32(1.5), np.broadcast_to(np.eye(h), (k, h, h))
        joint, shared = (rng.standard_normal(s).astype(np.float32) for s in ((f, h), (f,)))
        made |= {"temp": temp, "joint_weight": joint, "joint_bias": shared}
        made["phi_k_softmax_dim_temp"] = _phi(x["k"], temp * identity, 0.0, "softmax_dim", eps)
        made["phi_k_exp_negation_identity"] = _phi(x["k"], identity, 0.0, "exp", eps)
        made["phi_k_softmax_joint2"] = _phi(x["k"], np.broadcast_to(joint.T, (k, h, f)), shared, "softmax_joint", eps)
        for ending in ("", "_bidir"):
            made |= {name + ending: a for name, a in _layer(x, not ending, activation, eps).items()}
        for name, loss, ending in gradients:
            of_loss = lambda x, loss=loss, ending=ending: _layer(x, not ending, activation, eps)[f"loss_{loss}"]  # noqa: E731
            made[f"d{name}_{loss}{ending}"] = _gradient(x, name, of_loss)
        arrays |= {case + name: np.asarray(array, np.float32) for name, array in made.items()}
    np.savez(path, meta=json.dumps({"config": config}), **arrays)
    return path


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        # Maps of keys for every query head; gradients of both losses, in both orders.
        (
            (2, 11, 2, 1, 3, 5, 7, 2),
            {
                "cases": ("",),
                "config": {},
                "gradients": (("Wq", "xent", ""), ("Wk", "mse", ""), ("Wk", "xent", "_bidir")),
            },
            36,
        ),
        # Maps for every key head, with biases, another function, another eps and two cases in a file.
        (
            (1, 67, 6, 3, 5, 4, 2, 3),
            {"cases": ("a_", "b_"), "config": {"activation": "exp_dim", "eps": 1e-3}, "biased": True},
            66,
        ),
    ],
)
def test_hedgehog_on_other_files(tmp_path, implementation, shape, options, count):
    path = _write(tmp_path / "other.npz", np.random.default_rng(17), shape=shape, **options)
    report = run(systems()["hedgehog"], path, implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == count
