"""The golden harness sees red, and every system's adapter is right on its own file and on files of other shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden import harness
from tests.golden.__main__ import main
from tests.golden.harness import Adapter, Case, Tolerance, compare, run, systems

ROOT = Path(__file__).parents[2]
EVERY_SYSTEM = [(name, choice) for name, adapter in systems().items() for choice in adapter.implementations]


@pytest.mark.parametrize(("system", "implementation"), EVERY_SYSTEM)
def test_agrees_with_the_authors_code(system, implementation):
    report = run(systems()[system], implementation=implementation)
    assert report.passed(strict=True), f"\n{report}"


def test_every_golden_file_has_an_adapter_and_every_adapter_a_file():
    assert {path.stem for path in harness.HERE.glob("*.npz")} == set(systems())


# The harness itself, on a system that doubles and squares


def _write(path, meta=None, **arrays):
    np.savez(path, meta=json.dumps(meta or {}), **arrays)
    return path


@pytest.fixture
def file(tmp_path):
    x = np.linspace(-3.0, 2.0, 35, dtype=np.float32).reshape(5, 7)
    return _write(tmp_path / "powers.npz", {"config": {"power": 2}}, x=x, double=2 * x, power=x**2, notes=np.arange(3))


def _adapter(compute, relative=1e-6, **uncovered):
    return Adapter("powers", compute, {"*": Tolerance(relative, "rounding")}, uncovered, (None,))


def _powers(case):
    x = case["x"].astype(np.float64)
    return {"double": 2 * x, "power": x ** case.meta["config"]["power"]}


def test_a_right_adapter_passes_and_what_it_leaves_out_is_named(file):
    report = run(_adapter(_powers), file)
    assert report.passed(strict=False)
    assert not report.passed(strict=True), "notes is neither read nor returned, without a reason"
    assert str(report).splitlines()[-2:] == [
        "uncovered: notes (no reason given)",
        "powers: 2 ok, 0 failed, 1 uncovered, 0 circular",
    ]
    excused = run(_adapter(_powers, notes="a list of remarks"), file)
    assert excused.passed(strict=True)
    assert "uncovered: notes (a list of remarks)" in str(excused)
    assert "1 uncovered" in str(excused)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda y: y + 1e-3, ""),
        (lambda y: np.where(np.arange(7) == 3, y * (1 + 1e-4), y), ""),
        (lambda y: np.full_like(y, np.nan), ""),
        (lambda y: y.T, "shape (7, 5), the reference has (5, 7)"),
        (lambda y: y[None], "shape (1, 5, 7), the reference has (5, 7)"),
        (lambda y: np.float32(0), "shape (), the reference has (5, 7)"),
    ],
)
def test_a_wrong_output_fails(file, change, problem):
    report = run(_adapter(lambda case: _powers(case) | {"double": change(2.0 * case["x"])}, notes="not needed"), file)
    assert not report.passed(strict=False)
    assert [c.ok for c in report.comparisons] == [False, True]
    assert report.comparisons[0].problem == problem
    assert str(report).endswith("powers: 1 ok, 1 failed, 1 uncovered, 0 circular")


def test_an_output_the_file_lacks_fails(file):
    report = run(_adapter(lambda case: _powers(case) | {"triple": 3 * case["x"]}), file)
    assert "FAILED: the file has no such array" in str(report)
    assert not report.passed(strict=False)


@pytest.mark.parametrize(
    "cheat",
    [
        lambda case: {"double": case["double"]},
        lambda case: {"double": case["double"] * (1 + 1e-9)},
        lambda case: {"double": dict(case.items())["double"]},
        lambda case: {"double": case.get("double")},
        lambda case: {"double": next(iter([array for array in case.values() if array.flat[0] == -6]))},
    ],
)
def test_returning_what_was_read_is_circular(file, cheat):
    report = run(_adapter(cheat, **{"*": "not the question"}), file)
    assert report.circular == ("double",)
    assert all(c.ok for c in report.comparisons)
    assert not report.passed(strict=False)
    assert str(report).endswith(", 1 circular")


def test_no_output_at_all_fails(file):
    report = run(_adapter(lambda case: {}, **{"*": "nothing is"}), file)
    assert not report.passed(strict=False)
    assert str(report).splitlines()[-2:] == [
        "the adapter returned no output",
        "powers: 0 ok, 0 failed, 4 uncovered, 0 circular",
    ]


def test_looking_without_reading_leaves_no_record(file):
    case = Case(file)
    assert "x" in case
    assert "y" not in case
    assert list(case) == ["x", "double", "power", "notes"]
    assert len(case) == 4
    assert case.read == set()
    with pytest.raises(KeyError):
        case["y"]
    with pytest.raises(ValueError, match="read-only"):
        case["x"][0, 0] = 1.0
    with pytest.raises(TypeError):
        case.meta["config"] = {}  # type: ignore[index]
    assert case.read == {"x"}


def test_an_output_without_a_tolerance_is_an_error(file):
    bare = Adapter("powers", _powers, {"d*": Tolerance(1e-6, "rounding")}, {}, (None,))
    with pytest.raises(ValueError, match="'power' has no tolerance"):
        run(bare, file)


def test_a_comparison_needs_both_errors_small():
    wanted = np.ones(10_000)
    outlier = wanted + 3e-3 * (np.arange(10_000) == 5)
    assert not compare("y", outlier, wanted, 1e-3).ok, "one element far off hides in the rms"
    spiked = np.where(np.arange(10_000) == 5, 100.0, 1e-3)
    assert not compare("y", spiked * (1 + 1e-2 * (spiked < 1)) + 4e-3, spiked, 1e-3).ok, "one spike hides the rest"
    assert compare("y", wanted + 9e-4, wanted, 1e-3).ok
    assert compare("y", np.zeros(3), np.zeros(3, np.float32), 1e-6).ok
    assert not compare("y", np.full(3, 1e-5), np.zeros(3), 1e-6).ok


def test_what_is_not_finite_and_what_is_no_float_must_be_equal():
    wanted = np.array([1.0, -np.inf, np.nan, 2.0])
    assert compare("y", wanted, wanted, 1e-6).ok
    for wrong in ([1.0, np.inf, np.nan, 2.0], [1.0, -np.inf, 0.0, 2.0], [np.nan, -np.inf, np.nan, 2.0]):
        assert not compare("y", np.array(wrong), wanted, 1e-6).ok
    assert compare("y", np.array([1, 2]), np.array([1, 2]), 1.0).ok
    assert not compare("y", np.array([1, 3]), np.array([1, 2]), 1.0).ok
    assert not compare("y", np.array([True, True]), np.array([True, False]), 1.0).ok
    assert not compare("y", np.array([1 + 1j]), np.array([1 + 2j]), 1e-3).ok


def test_a_system_has_one_adapter():
    with pytest.raises(ValueError, match="gla: there is an adapter already"):
        harness.adapter("gla", tolerances={})(lambda case: {})


# The command


def test_the_command_says_what_it_found(tmp_path, file, monkeypatch, capsys):
    monkeypatch.setitem(harness._ADAPTERS, "powers", _adapter(_powers))
    assert main(["powers", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["output", "max", "abs", "error", "rms", "ratio", "tolerance", "ok"]
    assert [line.split()[0] for line in lines[1:3]] == ["double", "power"]
    assert all(line.endswith(" ok") for line in lines[1:3])
    assert lines[3:] == ["uncovered: notes (no reason given)", "powers: 2 ok, 0 failed, 1 uncovered, 0 circular"]
    assert main(["powers", str(file), "--strict"]) == 1
    monkeypatch.setitem(harness._ADAPTERS, "powers", _adapter(_powers, notes="a list of remarks"))
    assert main(["powers", str(file), "--strict"]) == 0

    wrong = _write(tmp_path / "wrong.npz", {"config": {"power": 3}}, **Case(file))
    capsys.readouterr()
    assert main(["powers", str(wrong)]) == 1
    assert capsys.readouterr().out.endswith("powers: 1 ok, 1 failed, 1 uncovered, 0 circular\n")
    monkeypatch.setitem(harness._ADAPTERS, "powers", _adapter(lambda case: {"double": case["double"]}))
    assert main(["powers", str(file)]) == 1
    monkeypatch.setitem(harness._ADAPTERS, "powers", _adapter(lambda case: {}))
    assert main(["powers", str(file)]) == 1


def test_the_implementation_reaches_the_adapter(file, monkeypatch):
    seen = []

    def note(case):
        seen.append(case.implementation)
        return _powers(case)

    monkeypatch.setitem(harness._ADAPTERS, "powers", _adapter(note))
    main(["powers", str(file)])
    main(["powers", str(file), "--implementation", "xla"])
    assert seen == [None, "xla"]


def test_the_command_knows_its_systems(capsys):
    assert main(["glaa"]) == 2
    assert f"no system is called 'glaa'; there are {', '.join(systems())}" in capsys.readouterr().err
    assert main(["gla", "nowhere.npz"]) == 2
    assert "nowhere.npz: no such file" in capsys.readouterr().err


def test_the_command_as_a_person_types_it():
    command = [sys.executable, "-m", "tests.golden", "lightning_attention2", "--strict"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("lightning_attention2: ")


# Other files of the same systems, computed in float64 by the token recurrence and its adjoint


def _recurrence(q, k, v, g, scale, s0, z0=None, do=None, ds=0.0):
    """Outputs and gradients of S_t = exp(g_t) S_{t-1} + k_t v_t', z_t = exp(g_t) z_{t-1} + k_t, o_t = scale S_t' q_t.

    Divided by (scale q_t z_t + 1e-10) if there is a z0 [B, N, H]. s0 is [B, N, H, V], g [B, T, N, H].
    """
    length = q.shape[1]
    states, norms = [s0], [np.zeros_like(s0[..., 0]) if z0 is None else z0]
    for t in range(length):
        decay = np.exp(g[:, t])
        states.append(decay[..., None] * states[-1] + k[:, t, :, :, None] * v[:, t, :, None, :])
        norms.append(decay * norms[-1] + k[:, t])
    every_state, every_norm = np.stack(states[1:], 1), np.stack(norms[1:], 1)
    o = scale * np.einsum("btnhv,btnh->btnv", every_state, q)
    below = np.ones_like(o[..., :1])
    if z0 is not None:
        below = scale * np.einsum("btnh,btnh->btn", every_norm, q)[..., None] + 1e-10
        o = o / below
    out = {"o": o, "S": states[-1], "z": norms[-1]}
    if do is None:
        return out
    dn = do / below
    dd = -(dn * o).sum(-1) if z0 is not None else np.zeros(o.shape[:-1])
    out["dq"] = scale * (np.einsum("btnhv,btnv->btnh", every_state, dn) + np.einsum("btnh,btn->btnh", every_norm, dd))
    grads = {name: np.zeros_like(x) for name, x in (("dk", k), ("dv", v), ("dg", g))}
    d_state, d_norm = np.zeros_like(s0) + ds, np.zeros_like(norms[0])
    for t in reversed(range(length)):
        d_state = d_state + scale * q[:, t, :, :, None] * dn[:, t, :, None, :]
        d_norm = d_norm + scale * q[:, t] * dd[:, t, :, None]
        grads["dk"][:, t] = np.einsum("bnhv,bnv->bnh", d_state, v[:, t]) + d_norm
        grads["dv"][:, t] = np.einsum("bnhv,bnh->bnv", d_state, k[:, t])
        decay = np.exp(g[:, t])
        grads["dg"][:, t] = decay * ((d_state * states[t]).sum(-1) + d_norm * norms[t])
        d_state, d_norm = decay[..., None] * d_state, decay * d_norm
    return out | grads | {"dh0": d_state, "dz0": d_norm}


def _slopes(heads):
    """ALiBi's slopes as the released code makes them."""
    power = 2 ** int(np.floor(np.log2(heads)))
    first = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    return first if power == heads else np.concatenate([first, _slopes(2 * power)[::2]])[:heads]


def _silu(x):
    return x / (1 + np.exp(-x))


def _write_lightning(path, rng, *, shape, tables, layer=None):
    """A file of the system with `shape` = B, T, N, H, V and, it may be, a layer of the given options."""
    b, t, n, h, v_dim = shape
    arrays = {"slopes": rng.uniform(0.01, 0.8, n)}
    q, k, v, do = (rng.standard_normal((b, t, n, d)) for d in (h, h, v_dim, v_dim))
    g = np.broadcast_to(-arrays["slopes"][:, None], (b, t, n, h))
    start = np.zeros((b, n, h, v_dim))
    r = _recurrence(q, k, v, g, 1.0, start, do=do)
    arrays |= {"q": q, "k": k, "v": v, "do": do, "o": r["o"], "final_state": r["S"]}
    arrays |= {name: r[name] for name in ("dq", "dk", "dv")}
    arrays["o_no_decay"] = _recurrence(q, k, v, 0 * g, 1.0, start)["o"]
    arrays |= {f"slopes_{number}": _slopes(number) for number in tables}
    config = {"B": b, "N": n, "T": t, "H": h, "V": v_dim}
    if layer is not None:
        config["module"] = layer
        arrays |= _tnl_layer(rng, **layer)
    return _write(path, {"config": config}, **{name: array.astype(np.float32) for name, array in arrays.items()})


def _tnl_layer(rng, *, embed_dim, num_heads, layer_idx, num_layers, bias):
    head_dim = embed_dim // num_heads
    shapes: dict[str, tuple[int, ...]] = {f"{name}_proj_weight": (embed_dim, embed_dim) for name in "qkvo"}
    shapes |= {"output_gate_0_weight": (head_dim, embed_dim), "output_gate_1_weight": (embed_dim, head_dim)}
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    p = {name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}
    p |= {"norm_weight": 1 + 0.1 * rng.standard_normal(embed_dim), "norm_bias": 0.1 * rng.standard_normal(embed_dim)}
    x = rng.standard_normal((2, 13, embed_dim))

    def linear(name, y):
        return y @ p[f"{name}_weight"].T + p.get(f"{name}_bias", 0.0)

    q, k, v = (_silu(linear(f"{name}_proj", x)).reshape(2, 13, num_heads, head_dim) for name in "qkv")
    slopes = _slopes(num_heads) * (1 - layer_idx / (num_layers - 1) + 1e-5)
    g = np.broadcast_to(-slopes[:, None], q.shape)
    o = _recurrence(q, k, v, g, 1.0, np.zeros((2, num_heads, head_dim, head_dim)))["o"].reshape(x.shape)
    o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-5)
    o = o * p["norm_weight"] + p["norm_bias"]
    gate = 1 / (1 + np.exp(-linear("output_gate_1", linear("output_gate_0", x))))
    return {
        f"mod_{name}": array
        for name, array in (p | {"x": x, "slopes": slopes, "y": linear("o_proj", o * gate)}).items()
    }


def _write_gla(path, rng, *, shape, scale, cases):
    """A file of the system with `shape` = B, T, N, K, V and some of the cases "gla", "simple" and "norm"."""
    b, t, n, k_dim, v_dim = shape
    q, k = (rng.uniform(0.05, 1.0, (b, t, n, k_dim)) for _ in range(2))
    v, do = (rng.standard_normal((b, t, n, v_dim)) for _ in range(2))
    h0, dht = (rng.standard_normal((b, n, k_dim, v_dim)) for _ in range(2))
    arrays = {"q": q, "k": k, "v": v, "h0": h0, "do": do}
    usual = k_dim**-0.5
    other = usual if scale is None else scale
    if "gla" in cases:
        gk = -rng.uniform(0.0, 3.0, q.shape)
        r = _recurrence(q, k, v, gk, usual, h0, do=do, ds=dht)
        arrays |= {"gk": gk, "dht": dht, "ht": r["S"], "dgk": r["dg"]}
        arrays |= {name: r[name] for name in ("o", "dq", "dk", "dv", "dh0")}
    if "simple" in cases:
        g = -rng.uniform(0.0, 3.0, q.shape[:-1])
        r = _recurrence(q, k, v, np.broadcast_to(g[..., None], q.shape), other, h0, do=do, ds=dht)
        arrays |= {"dht": dht, "simple_g": g, "simple_ht": r["S"], "simple_dg": r["dg"].sum(-1)}
        arrays |= {f"simple_{name}": r[name] for name in ("o", "dq", "dk", "dv", "dh0")}
    if "norm" in cases:
        z0 = rng.uniform(0.1, 1.0, (b, n, k_dim))
        r = _recurrence(q, k, v, np.zeros_like(q), other, h0, z0, do=do)
        arrays |= {"norm_z0": z0[:, None], "norm_z": r["z"][:, None]}
        arrays |= {f"norm_{name}": r[name] for name in ("o", "S", "dq", "dk", "dv", "dh0")}
        arrays |= {"norm_dz0": r["dz0"][:, None]}
    config = {"B": b, "T": t, "N": n, "K": k_dim, "V": v_dim, "simple_and_norm_scale": scale}
    return _write(path, {"config": config}, **{name: array.astype(np.float32) for name, array in arrays.items()})


def _delta_recurrence(q, k, v, beta, g, scale, s0, do, ds):
    """Outputs and gradients of S~_t = exp(g_t) S_{t-1}, S_t = S~_t + beta_t k_t (v_t - S~_t' k_t)'.

    o_t = scale S_t' q_t. q and k are [B, T, N, H], the rest has M heads, a multiple of N: g [B, T, M, H].
    """
    shared = v.shape[2] // q.shape[2]
    q, k = (np.repeat(x, shared, axis=2) for x in (q, k))
    kept, states, errors = [], [s0], []
    for t in range(q.shape[1]):
        kept.append(np.exp(g[:, t])[..., None] * states[-1])
        errors.append(v[:, t] - np.einsum("bnhv,bnh->bnv", kept[-1], k[:, t]))
        states.append(kept[-1] + beta[:, t, :, None, None] * k[:, t, ..., None] * errors[-1][..., None, :])
    out = {"o": scale * np.einsum("btnhv,btnh->btnv", np.stack(states[1:], 1), q), "ht": states[-1]}
    grads = {name: np.zeros_like(x) for name, x in (("dq", q), ("dk", k), ("dv", v), ("dbeta", beta), ("dg", g))}
    d_state = ds
    for t in reversed(range(q.shape[1])):
        d_state = d_state + scale * q[:, t, ..., None] * do[:, t, ..., None, :]
        grads["dq"][:, t] = scale * np.einsum("bnhv,bnv->bnh", states[t + 1], do[:, t])
        written = np.einsum("bnhv,bnh->bnv", d_state, k[:, t])
        grads["dbeta"][:, t] = (written * errors[t]).sum(-1)
        d_error = beta[:, t, :, None] * written
        grads["dv"][:, t] = d_error
        grads["dk"][:, t] = beta[:, t, :, None] * np.einsum("bnhv,bnv->bnh", d_state, errors[t])
        grads["dk"][:, t] -= np.einsum("bnhv,bnv->bnh", kept[t], d_error)
        d_state = d_state - k[:, t, ..., None] * d_error[..., None, :]
        grads["dg"][:, t] = (d_state * kept[t]).sum(-1)
        d_state = np.exp(g[:, t])[..., None] * d_state
    for name in ("dq", "dk"):
        grads[name] = grads[name].reshape(*q.shape[:2], -1, shared, q.shape[-1]).sum(3)
    return out | grads | {"dh0": d_state}


def _write_gated_delta_rule(path, rng, *, shape, scale, cases):
    """A file of the system with `shape` = B, T, N, HV, K, V and some of the cases "gated", "kda" and "delta"."""
    b, t, n, m, k_dim, v_dim = shape
    q, k = (rng.standard_normal((b, t, n, k_dim)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, do = (rng.standard_normal((b, t, m, v_dim)) for _ in range(2))
    h0, dht = (rng.standard_normal((b, m, k_dim, v_dim)) for _ in range(2))
    beta = rng.uniform(0.0, 1.0, (b, t, m))
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "h0": h0, "do": do, "dht": dht}
    usual = k_dim**-0.5
    for case, prefix, channels in (("gated", "", 1), ("kda", "kda_", k_dim), ("delta", "delta_", 0)):
        if case not in cases:
            continue
        g = -rng.exponential(0.5, (b, t, m, max(channels, 1))) * (channels > 0)
        used = usual if scale is None or case == "delta" else scale
        r = _delta_recurrence(q, k, v, beta, np.broadcast_to(g, (b, t, m, k_dim)).copy(), used, h0, do, dht)
        if case == "delta":
            r = {name: r[name] for name in ("o", "ht")}
        elif case == "gated":
            r["dg"] = r["dg"].sum(-1)
        if case != "delta":
            r["g"] = g if case == "kda" else g[..., 0]
        arrays |= {prefix + name: array for name, array in r.items()}
    config = {"B": b, "T": t, "N": n, "HV": m, "K": k_dim, "V": v_dim, "scale": scale}
    return _write(path, {"config": config}, **{name: array.astype(np.float32) for name, array in arrays.items()})


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("shape", "tables", "layer"),
    [
        (
            (2, 19, 3, 5, 7),
            (5, 16, 33),
            {"embed_dim": 15, "num_heads": 3, "layer_idx": 4, "num_layers": 5, "bias": True},
        ),
        ((1, 131, 5, 3, 2), (), None),
    ],
)
def test_lightning_on_other_files(tmp_path, implementation, shape, tables, layer):
    path = _write_lightning(tmp_path / "other.npz", np.random.default_rng(7), shape=shape, tables=tables, layer=layer)
    report = run(systems()["lightning_attention2"], path, implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == 6 + len(tables) + (2 if layer else 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("shape", "scale", "cases"),
    [((2, 23, 3, 5, 7), 0.3, ("gla", "simple", "norm")), ((1, 83, 5, 3, 2), None, ("norm",))],
)
def test_gla_on_other_files(tmp_path, implementation, shape, scale, cases):
    path = _write_gla(tmp_path / "other.npz", np.random.default_rng(11), shape=shape, scale=scale, cases=cases)
    report = run(systems()["gla"], path, implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == sum({"gla": 7, "simple": 7, "norm": 8}[case] for case in cases)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("shape", "scale", "cases"),
    [((2, 23, 3, 6, 5, 7), 0.3, ("gated", "kda", "delta")), ((1, 83, 5, 5, 3, 2), None, ("kda",))],
)
def test_gated_delta_rule_on_other_files(tmp_path, implementation, shape, scale, cases):
    path = _write_gated_delta_rule(
        tmp_path / "other.npz", np.random.default_rng(13), shape=shape, scale=scale, cases=cases
    )
    report = run(systems()["gated_delta_rule"], path, implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == sum({"gated": 8, "kda": 8, "delta": 2}[case] for case in cases)
