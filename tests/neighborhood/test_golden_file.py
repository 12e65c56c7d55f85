"""The golden adapter reads shapes, options and cases from its file: it is right on a file of other ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden.harness import run, systems
from tests.neighborhood.test_window import defined

CASES = (
    {"case": 3, "shape": [17], "kernel_size": [4], "stride": [2], "dilation": [3], "is_causal": [True], "M": 0},
    {"case": 7, "shape": [5, 7], "kernel_size": [3, 2], "stride": [3, 1], "dilation": [1, 2],
     "is_causal": [False, True], "M": 5},
)  # fmt: skip


def write(path, rng):
    """Softmax with its gradients in NumPy, over masks made axis by axis."""
    arrays, cases, scale = {}, [], 0.4
    for config in CASES:
        grid, m = tuple(config["shape"]), config["M"]
        tokens, b, n, k, h, v = int(np.prod(grid)), 2, 6, 2, 3, 5
        seen = np.ones((1, 1), bool)
        options = (config[name] for name in ("shape", "kernel_size", "stride", "dilation", "is_causal"))
        for extent, window, stride, dilation, is_causal in zip(*options, strict=True):
            along = np.zeros((extent, extent), bool)
            for g in range(dilation):
                x = np.arange(g, extent, dilation)
                along[np.ix_(x, x)] = defined(len(x), window, stride, is_causal)
            seen = np.kron(seen, along)
        q, key, value, do = (rng.standard_normal((b, tokens + more, heads, width))
                             for heads, width, more in ((n, h, 0), (k, h, m), (k, v, m), (n, v, 0)))  # fmt: skip
        allowed = np.pad(seen, [(0, 0), (0, m)], constant_values=True)
        rep = [np.repeat(x, n // k, axis=2) for x in (key, value)]
        z = np.where(allowed, scale * np.einsum("btnh,bsnh->bnts", q, rep[0]), -np.inf)
        lse = np.log(np.exp(z).sum(-1))
        p = np.exp(z - lse[..., None])
        out = np.einsum("bnts,bsnv->btnv", p, rep[1])
        ds = p * (np.einsum("btnv,bsnv->bnts", do, rep[1]) - np.einsum("btnv,btnv->bnt", do, out)[..., None])
        dq = scale * np.einsum("bnts,bsnh->btnh", ds, rep[0])
        dk, dv = scale * np.einsum("bnts,btnh->bsnh", ds, q), np.einsum("bnts,btnv->bsnv", p, do)
        dk, dv = (x.reshape(b, tokens + m, k, n // k, -1).sum(3) for x in (dk, dv))
        found = {"q": q, "k": key[:, :tokens], "v": value[:, :tokens], "do": do, "out": out, "dq": dq,
                 "dk": dk[:, :tokens], "dv": dv[:, :tokens], "lse": np.moveaxis(lse, 1, 2)}  # fmt: skip
        found = {name: x.reshape(b, *grid, *x.shape[2:]) for name, x in found.items()}
        if m:
            found |= {"additional_keys": key[:, tokens:], "additional_values": value[:, tokens:],
                      "d_additional_keys": dk[:, tokens:], "d_additional_values": dv[:, tokens:]}  # fmt: skip
        prefix = f"c{config['case']}_"
        arrays |= {prefix + name: x.astype(np.float32) for name, x in found.items()}
        arrays[prefix + "mask"] = seen.astype(np.uint8)
        cases.append({**config, "scale": scale, "num_additional_kv": m})
    np.savez(path, meta=json.dumps({"cases": cases}), **arrays)
    return path


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_on_another_file(tmp_path, implementation):
    path = write(tmp_path / "other.npz", np.random.default_rng(3))
    report = run(systems()["neighborhood_attention"], path, implementation)
    assert len(report.comparisons) == 6 + 8
    assert not report.uncovered
    assert not report.circular
    # The inputs are rounded to float32 after the outputs were made from them.
    assert all(c.max_abs < 2e-6 for c in report.comparisons), f"\n{report}"
