"""Each op inside Flax's own attention layers, and every keyword it cannot honour refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jattn
from jattn import as_attention_fn
from jattn.catalog import CATALOG

WIDTH, LENGTH = 12, 11


def fixed(entry):
    return dict(entry.example) | ({"is_causal": True} if entry.name == "linear" else {})


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)), jnp.float32)


def nnx_layer(**options):
    return nnx.MultiHeadAttention(
        num_heads=3, in_features=WIDTH, qkv_features=WIDTH, decode=False, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
def test_every_op_runs_in_both_layers_and_is_what_they_compute(entry, x):
    seen = {}
    op = entry.load_op()

    def spy(query, key, value, **options):
        seen["out"] = op(query, key, value, **options)
        return seen["out"]

    attention_fn = as_attention_fn(op, **fixed(entry))
    layer = nnx_layer(attention_fn=attention_fn)
    out = layer(x)
    query, key, value = (getattr(layer, name)(x) for name in ("query", "key", "value"))
    expected = layer.out(op(query, key, value, **fixed(entry)))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    gradient = jax.grad(lambda x: layer(x).sum())(x)
    assert jnp.isfinite(gradient).all()
    assert float(jnp.abs(gradient).max()) > 0

    module = linen.MultiHeadDotProductAttention(num_heads=3, attention_fn=attention_fn, deterministic=True)
    parameters = module.init(jax.random.key(0), x)
    p = parameters["params"]
    heads = (jnp.einsum("btd,dnh->btnh", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value"))
    expected = jnp.einsum("btnh,nhd->btd", op(*heads, **fixed(entry)), p["out"]["kernel"]) + p["out"]["bias"]
    # With keys of any length a delta rule's outputs may grow to hundreds.
    np.testing.assert_allclose(module.apply(parameters, x), expected, atol=1e-5, rtol=1e-6)


def test_softmax_is_flax_softmax_with_masks_and_causality(x):
    ours, theirs = nnx_layer(attention_fn=as_attention_fn(jattn.dot_product_attention)), nnx_layer()
    padding = nnx.make_attention_mask(jnp.ones((2, LENGTH)), jnp.arange(LENGTH)[None] < jnp.array([[7], [9]]))
    assert padding.dtype == jnp.float32
    for context in ({}, {"mask": padding}, {"mask": nnx.make_causal_mask(jnp.ones((2, LENGTH)))}, {"is_causal": True}):
        np.testing.assert_allclose(ours(x, **context), theirs(x, **context), atol=2e-6)


def test_more_batch_axes(x):
    layer = nnx_layer(attention_fn=as_attention_fn(jattn.dot_product_attention))
    folded = x.reshape(2, 1, LENGTH, WIDTH)
    mask = jnp.ones((1, LENGTH, LENGTH)).at[:, :, 4:].set(0)
    np.testing.assert_allclose(layer(folded, mask=mask)[:, 0], layer(x, mask=mask[None]), atol=1e-6)


def test_a_causal_op_accepts_a_causal_layer(x):
    layer = nnx_layer(attention_fn=as_attention_fn(jattn.lightning_attention))
    np.testing.assert_array_equal(layer(x, is_causal=True), layer(x))


def test_decoding_with_flax_cache_equals_the_parallel_layer(x):
    layer = nnx_layer(attention_fn=as_attention_fn(jattn.dot_product_attention))
    expected = layer(x, mask=nnx.make_causal_mask(jnp.ones((2, LENGTH))))
    layer.init_cache(x.shape)
    steps = [layer(x[:, t : t + 1], decode=True) for t in range(LENGTH)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("op", "options", "keywords", "error", "message"),
    [
        (
            "dot_product_attention",
            {},
            {"dropout_rate": 0.1, "deterministic": False},
            NotImplementedError,
            "dropout_rate",
        ),
        ("dot_product_attention", {}, {"module": object()}, NotImplementedError, "module: .* cannot sow"),
        ("dot_product_attention", {}, {"qk_attn_weights_einsum": jnp.einsum}, NotImplementedError, "own contractions"),
        ("dot_product_attention", {}, {"precision": ("high", "highest")}, NotImplementedError, "precision"),
        ("dot_product_attention", {"is_causal": True}, {"is_causal": True}, ValueError, "is_causal: fixed by"),
        ("sliding_window_attention", {"window": 3}, {"is_causal": True}, ValueError, "is_causal: .* own arguments"),
        ("sliding_window_attention", {"window": 3}, {"mask": jnp.ones((2, 1, 5, 5))}, ValueError, "mask: .* use an op"),
        ("lightning_attention", {}, {"bias": jnp.ones((2, 1, 5, 5))}, ValueError, "bias: .* dot_product_attention"),
        ("lightning_attention", {}, {"mask": jnp.ones((2, 1, 5, 5))}, ValueError, "mask"),
    ],
)
def test_what_cannot_be_honoured_is_refused(op, options, keywords, error, message):
    q = jnp.ones((2, 5, 3, 4))
    with pytest.raises(error, match=message):
        as_attention_fn(getattr(jattn, op), **options)(q, q, q, **keywords)


def test_dropout_is_refused_only_where_it_would_act():
    q = jnp.ones((2, 5, 3, 4))
    out = as_attention_fn(jattn.dot_product_attention)(q, q, q, dropout_rate=0.1, deterministic=True)
    np.testing.assert_allclose(out, q, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"windw": 3}, TypeError, "windw: sliding_window_attention has no such option; it has window"),
        ({"query": 3}, TypeError, "query: sliding_window_attention has no such option"),
        ({"window": 3, "return_lse": True}, ValueError, "return_lse: a Flax layer takes one array"),
    ],
)
def test_options_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        as_attention_fn(jattn.sliding_window_attention, **options)


def test_it_is_hashable_and_equal_by_value():
    one, two = (as_attention_fn(jattn.sliding_window_attention, window=3) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != as_attention_fn(jattn.sliding_window_attention, window=4)


def test_arrays_among_its_options_count_by_their_values(x):
    def lightning(factor):
        slopes = factor * jattn.lightning_slopes(3)
        return nnx_layer(attention_fn=as_attention_fn(jattn.lightning_attention, slopes=slopes))

    traces = []

    @nnx.jit
    def apply(layer, x):
        traces.append(1)
        return layer(x)

    one, same, other = (apply(lightning(factor), x) for factor in (1, 1, 2))
    assert len(traces) == 2
    np.testing.assert_array_equal(one, same)
    np.testing.assert_allclose(other, lightning(2)(x), atol=1e-6)
    graph, weights = nnx.split(lightning(2))
    merged = jax.jit(lambda graph, weights, x: nnx.merge(graph, weights)(x), static_argnums=0)
    np.testing.assert_array_equal(merged(graph, weights, x), other)


def test_an_op_is_no_name():
    with pytest.raises(TypeError, match=r"op: expected an op .* jattn.dot_product_attention, got 'softmax'"):
        as_attention_fn("softmax")
