"""The adapter of `dsf` on files of other shapes, with other options, some layers left out and others twice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.golden.harness import run, systems


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def gelu(x):
    erf = np.vectorize(math.erf)
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def attention(rng, x, *, heads, d_qk, bias=True, kind="linear", normalizer="exp"):
    """The layer MHA of the released code, or MHNA, and its arrays."""
    width = x.shape[-1]
    shapes = {"Wqk": (2 * d_qk, width), "Wv": (width, width), "out_proj": (width, width)}
    if kind == "norm":
        shapes["Wn"] = (heads, width)
    p = {f"{name}_weight": 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}
    if bias:
        p |= {f"{name}_bias": 0.3 * rng.standard_normal(shape[0]) for name, shape in shapes.items()}

    def linear(name, y):
        return y @ p[f"{name}_weight"].T + p.get(f"{name}_bias", 0.0)

    batch, length = x.shape[:2]
    query, key = np.split(linear("Wqk", x), 2, axis=-1)
    query, key, value = (y.reshape(batch, length, heads, -1) for y in (query, key, linear("Wv", x)))
    causal = np.tril(np.ones((length, length)))
    outputs = {}
    if kind == "linear":
        query, key = (np.where(y < 0, np.exp(y), y + 1) for y in (query, key))
    scores = np.einsum("bihd,bjhd->bhij", query, key)
    if kind == "softmax":
        scores = np.exp(scores * query.shape[-1] ** -0.5)
    scores = scores * causal
    if kind == "norm":
        logits = linear("Wn", x)
        eta = {"exp": np.exp, "softplus": softplus, "exp_of:sigmoid": lambda y: np.exp(sigmoid(y))}[normalizer](logits)
        outputs["dsf_lambda"] = np.concatenate([np.ones_like(eta[:, :1]), eta[:, :-1] / eta[:, 1:]], axis=1)
        sums = np.einsum("bjhd,bjhv->bhdv", key, value)
        outputs["dsf_final_state"] = sums / eta[:, -1, :, None, None]
        scores = scores / eta.swapaxes(1, 2)[..., None]
    else:
        scores = scores / scores.sum(-1, keepdims=True)
    out = np.einsum("bhij,bjhv->bihv", scores, value).reshape(x.shape)
    return p | outputs | {"y": linear("out_proj", out)}


def s6(rng, x, *, states, rank, scalar=False):
    """The layer S6, or S6_2, whose rank is 1."""
    width = x.shape[-1]
    p = {
        "A_log": rng.standard_normal(1) if scalar else rng.standard_normal((width, states)),
        "D": rng.standard_normal(width),
        "x_proj_weight": 0.4 * rng.standard_normal((rank + 2 * states, width)),
        "dt_proj_weight": 0.4 * rng.standard_normal((width, rank)),
        "dt_proj_bias": rng.standard_normal(width),
        "out_proj_weight": 0.4 * rng.standard_normal((width, width)),
    }
    projected = x @ p["x_proj_weight"].T
    low, b, c = np.split(projected, [rank, rank + states], axis=-1)
    delta = softplus((low if scalar else low @ p["dt_proj_weight"].T) + p["dt_proj_bias"])
    state, out = np.zeros((x.shape[0], width, states)), []
    for t in range(x.shape[1]):
        lam = np.exp(-delta[:, t, :, None] * np.exp(p["A_log"]))
        state = lam * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((state * c[:, t, None]).sum(-1) + p["D"] * x[:, t])
    return p | {"y": np.stack(out, 1) @ p["out_proj_weight"].T, "dsf_final_state": state}


def qlstm(rng, x, *, expand, taps, is_reversed):
    """The layer qLSTM."""
    batch, length, width = x.shape
    hidden = expand * width
    p = {
        "alpha": np.float64(0.6),
        "input_weight": 0.5 * rng.standard_normal((2 * hidden, width)),
        "conv_weight": 0.5 * rng.standard_normal((hidden, 1, taps)),
        "conv_bias": 0.5 * rng.standard_normal(hidden),
        "gates_weight": 0.3 * rng.standard_normal((3 * hidden, hidden)),
        "gates_bias": rng.standard_normal(3 * hidden),
        "output_weight": 0.3 * rng.standard_normal((width, hidden)),
    }
    gate, u = np.split(x @ p["input_weight"].T, 2, axis=-1)
    before = np.concatenate([np.zeros((batch, taps - 1, hidden)), u], axis=1)
    u = p["conv_bias"] + sum(p["conv_weight"][:, 0, i] * before[:, i : i + length] for i in range(taps))
    forget, write, read = np.split(u @ p["gates_weight"].T + p["gates_bias"], 3, axis=-1)
    lam = sigmoid(-forget) ** p["alpha"] if is_reversed else sigmoid(forget)
    h, out = 0, []
    for t in range(length):
        h = lam[:, t] * h + sigmoid(write[:, t]) * u[:, t]
        out.append(sigmoid(read[:, t]) * h)
    return p | {"y": (gelu(gate) * np.stack(out, 1)) @ p["output_weight"].T}


def rglru(rng, x, *, blocks, positions):
    """The layer RG-LRU."""
    size = x.shape[-1] // blocks
    p = {"position_ids": positions, "recurrent_param": rng.standard_normal(x.shape[-1]) - 3}
    gates = {}
    for name in ("input_gate", "recurrent_gate"):
        p[f"{name}_weight"], p[f"{name}_bias"] = (
            rng.standard_normal((blocks, size, size)),
            rng.standard_normal((blocks, size)),
        )
        split = x.reshape(*x.shape[:2], blocks, size)
        gates[name] = sigmoid(np.einsum("btni,nio->btno", split, p[f"{name}_weight"]) + p[f"{name}_bias"]).reshape(
            x.shape
        )
    lam = np.exp(-8 * gates["recurrent_gate"] * softplus(p["recurrent_param"]))
    starts = (positions == 0)[..., None]
    written = np.where(starts, 1, np.sqrt(1 - lam**2)) * gates["input_gate"] * x
    h, out = 0, []
    for t in range(x.shape[1]):
        h = np.where(starts[:, t], 0, lam[:, t]) * h + written[:, t]
        out.append(h)
    return p | {"y": np.stack(out, 1)}


def write(path, config, layers, **shared):
    arrays = dict(shared)
    for prefix, layer in layers.items():
        arrays |= {f"{prefix}_{name}": array for name, array in layer.items()}
    kept = {k: a if np.issubdtype(np.asarray(a).dtype, np.integer) else np.float32(a) for k, a in arrays.items()}
    np.savez(path, meta=json.dumps({"config": config}), **kept)
    return path


def many_layers(rng):
    x, own = rng.standard_normal((2, 17, 15)), rng.standard_normal((1, 5, 6))
    positions = np.stack([np.concatenate([np.arange(4), np.arange(13)]), np.arange(17)])
    layers = {
        "softmax": attention(rng, x, heads=3, d_qk=6, kind="softmax"),
        "linear": attention(rng, x, heads=3, d_qk=9, bias=False),
        "norm": attention(rng, x, heads=3, d_qk=12, kind="norm", normalizer="softplus"),
        "s6": s6(rng, x, states=3, rank=2),
        "ssd": s6(rng, x, states=5, rank=1, scalar=True),
        "qlstm": qlstm(rng, x, expand=1, taps=3, is_reversed=False),
        "qlstm_rev": qlstm(rng, x, expand=3, taps=5, is_reversed=True),
        "rglru": rglru(rng, x, blocks=5, positions=positions),
        "wide_norm": {"x": own} | attention(rng, own, heads=2, d_qk=4, kind="norm", normalizer="exp_of:sigmoid"),
    }
    config = {"num_heads": 3, "norm": {"normalizer": "softplus"}, "wide_norm": {"normalizer": "exp_of:sigmoid"}}
    return config, layers, x


@pytest.mark.parametrize("kept", [None, ("ssd", "qlstm_rev"), ("wide_norm",)], ids=str)
def test_dsf_on_other_files(tmp_path, kept):
    config, layers, x = many_layers(np.random.default_rng(17))
    layers = {name: layer for name, layer in layers.items() if kept is None or name in kept}
    shared = {} if kept == ("wide_norm",) else {"x": x}
    report = run(systems()["dsf"], write(tmp_path / "other.npz", config, layers, **shared))
    assert report.passed(strict=True), f"\n{report}"
    outputs = {"y", "dsf_lambda", "dsf_final_state"}
    assert len(report.comparisons) == sum(len(outputs & set(layer)) for layer in layers.values())
