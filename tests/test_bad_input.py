"""Every op, fed with arguments of which one is wrong: it answers rightly or says which one.

Hypothesis spoils one argument of a good call. A call that is refused must say so in a ValueError, TypeError or
NotImplementedError that begins with the argument's name; a call that is accepted must equal a definition in NumPy.
Nothing is compiled to find out: the call is only traced.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jattn import catalog, masks
from jattn.linear.recurrence import LinearState
from jattn.sparse.block_mask import BlockMask

B, T, N, K, H, V = 2, 13, 6, 3, 5, 7
MAPS = ("query_weight", "key_weight", "query_bias", "key_bias")
ARRAYS = ("query", "key", "value", "bias", "kv_bias", "sinks", "beta", "log_decay", "slopes", "gamma", *MAPS)
OPERANDS = ("query", "key", "value")
UNSCALED = ("linear", "lightning")
BY_WIDTH = ("kronecker",)
"""Scaled by 1 / H."""


def good(entry: catalog.Entry) -> dict[str, Any]:
    """Arguments that every option may be added to, by name."""
    rng = np.random.default_rng(0)
    shapes = {
        "query": (B, T, N, H), "key": (B, T, K, H), "value": (B, T, K, V), "bias": (B, N, T, T), "sinks": (N,),
        "kv_bias": (B, K, T),
        "log_decay": (B, T, K, H) if "channel_decay" in entry.features else (B, T, K), "slopes": (K,), "gamma": (K,),
        "beta": (B, T, K), "query_weight": (N, H, H), "key_weight": (K, H, H), "query_bias": (N, H), "key_bias": (K, H),
    }  # fmt: skip
    x: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    x["log_decay"] = -np.abs(x["log_decay"])
    x["slopes"] = np.abs(x["slopes"])
    x["gamma"], x["beta"] = (1 / (1 + np.exp(-x[name])) for name in ("gamma", "beta"))
    if "beta" in inspect.signature(entry.load_op()).parameters:
        x["key"] /= np.linalg.norm(x["key"], axis=-1, keepdims=True)
    x["segment_ids"] = np.sort(rng.integers(0, 3, (B, T))).astype(np.int32)
    x["mask"] = np.ones((B, 1, 1, T), bool)
    x["key_mask"] = np.ones((B, T), bool)
    x["initial_state"] = LinearState(rng.standard_normal((B, K, H, V)).astype(np.float32), None)
    if "feature_map" in entry.features:
        S, z = rng.standard_normal((B, K, 2 * H, V)), rng.uniform(0.1, 1, (B, K, 2 * H))
        x["initial_state"] = LinearState(S.astype(np.float32), z.astype(np.float32))
    accepted = inspect.signature(entry.load_op()).parameters
    return {**{name: array for name, array in x.items() if name in accepted}, **entry.example}


def split(x: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that hold arrays, and those that do not."""
    arrays = {n: leaf for n, leaf in x.items() if any(isinstance(a, np.ndarray) for a in jax.tree.leaves(leaf))}
    return arrays, {n: leaf for n, leaf in x.items() if n not in arrays}


def outcome(entry: catalog.Entry, x: dict[str, Any]) -> tuple[Any, str | None]:
    """The shape of the result or the message of the refusal; any other exception goes on and fails the test."""
    arrays, static = split(x)
    try:
        return jax.eval_shape(lambda arrays: entry.load_op()(**arrays, **static), arrays), None
    except (ValueError, TypeError, NotImplementedError) as error:
        return None, str(error)


def run(entry: catalog.Entry, x: dict[str, Any]) -> np.ndarray:
    """The output of a call that is accepted; an argument that is `None` is as one left out.

    Operation by operation: of small arrays most programs are those of other calls, and are compiled already.
    """
    given = {name: leaf for name, leaf in x.items() if leaf is not None}
    result = entry.load_op()(**{"implementation": "reference", **given})
    return np.asarray(result[0] if isinstance(result, tuple) else result, np.float64)


def truth(entry: catalog.Entry, x: dict[str, Any]) -> np.ndarray:
    """The output in float64 from all `[B, N, T, S]` weights at once."""
    x = {name: leaf for name, leaf in x.items() if leaf is not None}
    wide = {name: np.asarray(x[name], np.float64) for name in ARRAYS if name in x}
    if "beta" in inspect.signature(entry.load_op()).parameters:
        return overwritten(wide, x)
    groups = x["query"].shape[2] // x["key"].shape[2]
    width = x["query"].shape[3]
    scale = 1.0 if entry.name in UNSCALED else 1 / width if entry.name in BY_WIDTH else width**-0.5
    query, key, value = (np.moveaxis(wide[name], 2, 1) for name in OPERANDS)
    if "feature_map" in entry.features:
        query, key = (mapped(wide, name, array) for name, array in (("query", query), ("key", key)))
        groups = query.shape[1] // key.shape[1]
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    value = np.repeat(value, query.shape[1] // value.shape[1], axis=1)
    distance = np.arange(query.shape[2])[:, None] - np.arange(key.shape[2])
    allowed = np.broadcast_to(x.get("mask", True), (*query.shape[:3], key.shape[2]))
    if "segment_ids" in x:
        ids = x["segment_ids"] if isinstance(x["segment_ids"], tuple) else (x["segment_ids"],) * 2
        allowed = allowed & (ids[0][:, None, :, None] == ids[1][:, None, None, :])
    if x.get("is_causal", "state" in entry.features):
        allowed = allowed & (distance >= 0)
    products = np.einsum("bnth,bnsh->bnts", query, key)
    if "state" in entry.features:
        gates = np.zeros(x["key"].shape[:3])
        gates = gates + wide.get("log_decay", 0) - wide.get("slopes", 0)
        if "gamma" in inspect.signature(entry.load_op()).parameters:
            gates = gates + np.log(wide.get("gamma", 1 - 2.0 ** (-5 - np.arange(gates.shape[2]))))
        sums = np.cumsum(np.repeat(np.moveaxis(gates, 2, 1), groups, axis=1), axis=2)
        weights = np.where(allowed, products * np.exp(-np.abs(sums[..., None] - sums[..., None, :])), 0)
        out = weights @ value
        total = weights.sum(axis=-1, keepdims=True)
        if "initial_state" in x:
            state = np.repeat(np.asarray(x["initial_state"].S, np.float64), groups, axis=1)
            out = out + np.exp(sums)[..., None] * (query @ state)
        if "feature_map" in entry.features:
            if "initial_state" in x:
                total = (
                    total + query @ np.repeat(np.asarray(x["initial_state"].z, np.float64), groups, axis=1)[..., None]
                )
            return np.moveaxis(out / np.where(total == 0, 1, total + x.get("eps", 1e-12)), 1, 2)
        return np.moveaxis(x.get("scale", scale) * out, 1, 2)
    if "window" in x:
        left, right = x["window"] if isinstance(x["window"], tuple) else (x["window"] - 1, 0)
        distance = distance + x.get("offset", 0)
        allowed = allowed & (distance <= left) & (distance >= -right)
    if "kernel_size" in x:
        allowed = allowed & in_windows(distance.shape[0], x)
    if "window_blocks" in x:
        size, last = x["block_size"], key.shape[2] - query.shape[2]
        blocks = (np.arange(query.shape[2])[:, None] + last) // size - np.arange(key.shape[2]) // size
        near = (blocks < x["window_blocks"]) | np.isin(blocks, 2 ** np.arange(9))
        allowed = allowed & (distance + last >= 0) & (near | (np.arange(key.shape[2]) // size < x["sink_blocks"]))
    if "block_mask" in x:
        symbolic = isinstance(x["block_mask"], masks.Mask)
        allowed = allowed & (x["block_mask"].dense(*distance.shape) if symbolic else x["block_mask"].to_dense())
    logits = x.get("scale", scale) * products + wide.get("bias", 0)
    if "kv_bias" in wide:
        logits = logits + np.repeat(wide["kv_bias"], groups, axis=1)[:, :, None]
    if "logits_soft_cap" in x:
        logits = x["logits_soft_cap"] * np.tanh(logits / x["logits_soft_cap"])
    weights = np.where(allowed, np.exp(logits), 0)
    total = weights.sum(axis=-1, keepdims=True)
    total = total + (np.exp(wide["sinks"])[:, None, None] if "sinks" in wide else 0)
    return np.moveaxis(weights / np.where(total == 0, 1, total) @ value, 1, 2)


def mapped(wide: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """The features that Hedgehog makes of `x [B, heads, T, H]` by default."""
    weight = wide.get(f"{name}_weight", np.broadcast_to(np.eye(x.shape[-1]), (x.shape[1], *[x.shape[-1]] * 2)))
    u = np.repeat(x, len(weight) // x.shape[1], axis=1) @ weight
    u = u + wide.get(f"{name}_bias", np.zeros(u.shape[1::2]))[:, None]
    positive, negative = np.exp(u), np.exp(-u)
    halves = (half / half.sum(axis=-1, keepdims=True) for half in (positive, negative))
    return np.concatenate(list(halves), axis=-1)


def overwritten(wide: dict[str, np.ndarray], x: dict[str, Any]) -> np.ndarray:
    """The delta rule, every state on its own and one token after another."""
    query, key, value = (wide[name] for name in OPERANDS)
    states, heads = value.shape[2], max(query.shape[2], value.shape[2])
    beta = wide.get("beta", np.ones(value.shape[:3]))
    gates = wide.get("log_decay", np.zeros(value.shape[:3]))
    gates = gates if gates.ndim == 4 else np.broadcast_to(gates, value.shape[:3])[..., None]
    query = np.repeat(query, heads // query.shape[2], axis=2)
    key = np.repeat(key, states // key.shape[2], axis=2)
    real = np.broadcast_to(x.get("mask", True), (len(query), 1, 1, query.shape[1]))[:, 0, 0]
    ids = x.get("segment_ids", np.zeros(query.shape[:2]))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, n in np.ndindex(len(query), heads):
        h = n * states // heads
        state = np.zeros((query.shape[3], value.shape[3]))
        if "initial_state" in x:
            state = np.asarray(x["initial_state"].S, np.float64)[b, h]
        for t in range(query.shape[1]):
            state = state * (ids[b, t] == ids[b, max(t - 1, 0)])
            if real[b, t]:
                k = key[b, t, h]
                state = np.exp(gates[b, t, h])[:, None] * state
                state = state + beta[b, t, h] * np.outer(k, value[b, t, h] - state.T @ k)
            out[b, t, n] = query[b, t, n] @ state
    return x.get("scale", query.shape[3] ** -0.5) * out


def in_windows(length: int, x: dict[str, Any]) -> np.ndarray:
    """Who sees whom in a neighborhood, one group and one query after the other."""
    window, stride, dilation = (np.ravel(x.get(n, 1))[0] for n in ("kernel_size", "stride", "dilation"))
    window = min(window, length // dilation)
    seen = np.zeros((length, length), bool)
    for group in range(dilation):
        tokens = np.arange(group, length, dilation)
        for i in range(len(tokens)):
            shared = [q for q in range(len(tokens)) if q // stride == i // stride]
            if np.ravel(x.get("is_causal", False))[0]:
                first, last = shared[-1] - window + 1, i
            else:
                leader = min(shared[0] + stride // 2, len(tokens) - 1)
                first = min(max(leader - window // 2, 0), len(tokens) - window)
                last = first + window - 1
            seen[tokens[i], tokens[max(first, 0) : last + 1]] = True
    return seen


def shape_changes(x: np.ndarray) -> dict[str, Any]:
    """An array of which the rank or one size is another; sizes become 0, 1, one less, and twice as large."""
    changes: dict[str, Any] = {"one axis less": x[0], "one axis more": x[None], "no axis": x.ravel()[0:1].reshape(())}
    for axis in range(x.ndim):
        for size in (0, 1, x.shape[axis] - 1, 2 * x.shape[axis]):
            changes[f"axis {axis} of size {size}"] = np.take(x, np.arange(size) % x.shape[axis], axis=axis)
    if x.ndim > 1:
        changes["transposed"] = np.ascontiguousarray(np.swapaxes(x, -1, -2))
    return changes


def type_changes(x: np.ndarray) -> dict[str, Any]:
    dtypes = ("int32", "uint8", "bool", "complex64", "float16", "bfloat16", "float32")
    casts = {dtype: x.astype(jnp.dtype(dtype)) for dtype in dtypes if jnp.dtype(dtype) != x.dtype}
    return {**casts, "a list": x.tolist(), "a number": 0.5, "None": None, "a string": "causal", "a dict": {"x": x}}


def state_changes(state: LinearState) -> dict[str, Any]:
    arrays = {**shape_changes(state.S), **type_changes(state.S)}
    z = np.ones((B, K, H), np.float32)
    if state.z is None:
        changes = {"z too": LinearState(state.S, z), "z for S": LinearState(z, None)}
    else:
        others = {**shape_changes(state.z), **type_changes(state.z)}
        changes = {f"z: {name}": LinearState(state.S, array) for name, array in others.items()}
    return {
        **{f"S: {name}": LinearState(array, state.z) for name, array in arrays.items()},
        **changes,
        "None": None,
        "an array": state.S,
        "a tuple": tuple(state),
    }


IDS = np.repeat([[1, 2]], [4, 9], axis=1).repeat(B, axis=0)
NUMBERS = (0, -1, 2.5, True, "0.5", None, 1j, [1], np.ones(1, np.float32), (1, 2), float("nan"))
OPTIONS: dict[str, tuple[Any, ...]] = {
    "window": (*NUMBERS, 4, 10**6, (0, 0), (2,), (1, 2, 3), (-1, 2), (1, 2.5), (1, True), "4"),
    "offset": (*NUMBERS, 1, -20),
    "kernel_size": (*NUMBERS, 3, 6, 7, 10**6, (4,), (3, 3), [3]),
    "stride": (*NUMBERS, 1, 3, 5, 6, (4,), (1, 1)),
    "dilation": (*NUMBERS, 1, 14, (1,), (1, 2)),
    "clamp_window": ("yes", None, 2, True, np.ones(1, bool)),
    "q_tile": (*NUMBERS, 3, (20,), (2, 2)),
    "kv_tile": (*NUMBERS, 3, (20,), (2, 2)),
    "block_size": (*NUMBERS, 16, 10**6),
    "window_blocks": (*NUMBERS, 3, 10**6),
    "sink_blocks": (*NUMBERS, 1, 10**6),
    "sample_size": (*NUMBERS, 5),
    "min_seq_len": (*NUMBERS, 14),
    "lsh_num_projs": (*NUMBERS, 3, 31),
    "rng": (*NUMBERS, 7, 2**32, np.zeros(2, np.uint32)),
    "exclude_block": ("yes", None, 2, False, np.ones(1, bool)),
    "bucket_order": ("inverse_gray", "binary", 0, None, True),
    "ragged": ("mask", "drop", 0, None, True),
    "scale": (*NUMBERS, 0.25),
    "logits_soft_cap": (*NUMBERS, 3.0, float("inf")),
    "chunk_size": (*NUMBERS, 3, -8, 8, 16.0, 2**20),
    "eps": NUMBERS,
    "eps_mode": ("numerator", 0, None, True),
    "normalize": ("yes", None, 2, np.ones(1, bool)),
    "is_causal": ("yes", None, 2, True, False, np.ones(1, bool)),
    "reverse": ("yes", None, 2, False, np.ones(1, bool)),
    "activation": ("relu", "softmax_dim", 0, None, ["exp"], np.ones(1, bool)),
    "return_lse": ("yes", None, 2, True, np.ones(1, bool)),
    "return_state": ("yes", None, 2, True, np.ones(1, bool)),
    "mask": ("causal", None, 1.0, [True], np.ones((B, 1, 1, T), np.float32), np.ones((T, T), bool),
             np.ones((B, N, T, T - 1), bool), np.ones((B, 2, T, T), bool), np.ones((1, 1, 1, T), bool),
             np.ones((B, T), bool), masks.Causal, np.ones((B, 1, 1, T), np.int32)),
    "block_mask": (None, "causal", True, np.ones((T, T), bool), masks.Causal, masks.Full(), masks.SlidingWindow(2, 1),
                   BlockMask.from_expr(masks.Causal(1), T, T, 4, 8), BlockMask.from_expr(masks.Causal(), T, T + 1),
                   *[BlockMask.from_dense(np.ones((*lists, T, T), bool)) for lists in ((1, 4), (3, 1))]),
    "score_mod": (None, 1, "alibi", lambda score, *where: score, lambda *_: 0.0, lambda score, *where: score[0]),
    "captured": (None, (), [0.5], (0.5,), np.ones(3), (np.ones(3),)),
    "dropout_rate": (*NUMBERS, 0.0, 0.5, 1.0),
    "dropout_seed": (*NUMBERS, 7, 2**32, np.int32(5)),
    "implementation": ("cuda", "", (), ("xla", "cuda"), ("reference",)),
    "key_masks": (None, (), 3, (None,), (np.ones((B, T)),), (np.ones((B, T + 1), bool),), (np.ones((B, T), bool),)),
    "windows": (None, (), 3, (0,), (3,), (3, 3)),
    "segment_ids": ((), (IDS,), (IDS, None), (IDS, IDS[:, 1:]), (IDS, IDS), [IDS] * 3),
}  # fmt: skip


@functools.cache
def changes_of(entry_name: str) -> dict[tuple[str, str], Any]:
    """(argument, what is done to it) -> what takes its place."""
    entry = catalog.get(entry_name)
    accepted = inspect.signature(entry.load_op()).parameters
    changes: dict[tuple[str, str], Any] = {}
    for name, argument in good(entry).items():
        if isinstance(argument, np.ndarray):
            found = {**shape_changes(argument), **type_changes(argument)}
        else:
            found = state_changes(argument) if isinstance(argument, LinearState) else {}
        changes |= {(name, change): value for change, value in found.items()}
    for name, values in OPTIONS.items():
        if name in accepted:
            changes |= {(name, f"option {i} {value!r:.40}"): value for i, value in enumerate(values)}
    return changes


def is_accepted(entry: catalog.Entry, x: dict[str, Any], name: str) -> bool:
    """Whether the op takes `x`, of which argument `name` is spoilt; if it does not, its message names an argument."""
    result, message = outcome(entry, x)
    if message is not None:
        # An argument that disagrees with another may be right, and then it is the other that the message begins with.
        begins = (*inspect.signature(entry.load_op()).parameters, "dimension ")
        assert any(word in message.split(":")[0] for word in begins), message
        assert name in OPERANDS or name in message or message.startswith("dimension "), message
        return False
    out = result[0] if isinstance(result, tuple) else result
    assert (out.shape, out.dtype) == ((*x["query"].shape[:3], x["value"].shape[3]), x["query"].dtype)
    return True


# Entries that share an op differ in their layers only.
OPS = tuple({entry.op: entry for entry in reversed(catalog.CATALOG)}.values())[::-1]
every_entry = pytest.mark.parametrize("entry", OPS, ids=lambda entry: entry.name)


@every_entry
@settings(derandomize=True, database=None, max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_wrong_argument_among_others_is_named(entry, data):
    changes = changes_of(entry.name)
    name, change = data.draw(st.sampled_from(sorted(changes)))
    x = good(entry)
    for optional in sorted(set(x) - {*OPERANDS, name, *entry.example}):
        if data.draw(st.booleans(), label=f"without {optional}"):
            del x[optional]
    is_accepted(entry, {**x, name: changes[name, change]}, name)


@every_entry
def test_a_wrong_argument_alone_is_named_or_the_answer_is_right(entry):
    alone = {name: value for name, value in good(entry).items() if name in (*OPERANDS, *MAPS, *entry.example)}
    accepted = 0
    for (name, change), value in changes_of(entry.name).items():
        x = {**alone, name: value}
        if is_accepted(entry, x, name):
            accepted += 1
            out = run(entry, x)
            want = truth(entry, x)
            assert np.max(np.abs(out - want)) <= 1e-5 * np.max(np.abs(want)), (name, change)
    assert 0 < accepted < len(changes_of(entry.name)) / 3
