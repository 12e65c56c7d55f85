"""Position-aligned, keyword-scoped attention; the properties are those of the specification."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import dot_product_attention, keyword_mask, keyword_scoped_attention, position_aligned_attention
from jattn.sparse.pka import pka_attention
from jattn.sparse.pka_streams import Stream, Streams, Subject

B, M, L, N, K, H, V = 2, 5, 13, 6, 3, 7, 11
IDS = np.array([[1, 3, 1], [4, -7, 99]], np.int32)
VALID = np.array([[True, True, True], [True, False, False]])
KEYWORDS = ((IDS, VALID), (IDS[:, :1], None))
COMBINE = ("add", "joint")
IMPLEMENTATIONS = ("xla", "reference")


def stream(rng, length, *, dtype=np.float64, heads=(N, K), large=1.0, batch=B):
    shapes = (batch, length, heads[0], H), (batch, length, heads[1], H), (batch, length, heads[1], V)
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return Stream((large * query).astype(dtype), key, value)


def make(*, text=M, image=L, spatial=1, subjects=(17,), keywords=KEYWORDS, own=False, seed=0, **options):
    """Random streams; `own` says whether conditions have queries."""
    rng = np.random.default_rng(seed)
    words, picture = stream(rng, text, **options), stream(rng, image, **options)
    conditions = [stream(rng, image, **options) for _ in range(spatial)]
    named = [Subject(*stream(rng, s, **options), *keywords[i]) for i, s in enumerate(subjects)]
    if not own:
        conditions, named = ([s._replace(query=None) for s in group] for group in (conditions, named))
    return Streams(words, picture, tuple(conditions), tuple(named))


def make_all(**options):
    return make(spatial=2, subjects=(17, 3), own=True, **options)


def make_mask(image=L, subjects=1, chance=0.4, seed=1):
    return np.random.default_rng(seed).random((B, subjects, image)) < chance


def to_float32(tree, dtype=np.float32):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def assert_close(got, want, tolerance):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance)


def heads_alike(x):
    return np.repeat(np.asarray(x), N // K, axis=2)


def softmax(q, k, v, scale, allowed=None):
    """A definition of its own in NumPy; `allowed [B, T, S]`. A row without keys gives 0."""
    k, v = heads_alike(k), heads_alike(v)
    z = np.einsum("btnh,bsnh->bnts", np.asarray(q), k) * scale
    z = z if allowed is None else np.where(allowed[:, None], z, -np.inf)
    largest = np.max(z, axis=-1, keepdims=True)
    p = np.exp(z - np.where(np.isinf(largest), 0, largest))
    total = p.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnv->btnv", p / np.where(total > 0, total, 1), v)


def in_numpy(x, mask, combine, scale):
    """The output of the image by the specification's words, from explicit boolean masks."""
    length = x.image.key.shape[1]
    every = np.ones((B, length, 1), bool)
    parts = [(x.text, every), (x.image, every), *((s, np.eye(length, dtype=bool)[None]) for s in x.spatial)]
    parts += [(s, every if mask is None else mask[:, j, :, None]) for j, s in enumerate(x.subjects)]
    parts = [(s, np.broadcast_to(seen, (B, length, s.key.shape[1]))) for s, seen in parts]
    groups = [parts] if combine == "joint" else [parts[:2], *([part] for part in parts[2:])]
    out = 0
    for group in groups:
        k, v = (np.concatenate([getattr(s, name) for s, _ in group], axis=1) for name in ("key", "value"))
        out = out + softmax(x.image.query, k, v, scale, np.concatenate([seen for _, seen in group], axis=-1))
    return out


@functools.cache
def program(options, with_gradient=True):
    def run(x, mask):
        def loss(x):
            outputs, after = pka_attention(x, mask, **dict(options))
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs)), (outputs, after)

        if not with_gradient:
            return loss(x)[1]
        ids = [(s.keyword_ids, s.keyword_valid) for s in x.subjects]
        arrays = x._replace(subjects=tuple(Stream(*s[:3]) for s in x.subjects))

        def of_arrays(arrays):
            named = tuple(Subject(*s, *words) for s, words in zip(arrays.subjects, ids, strict=True))
            return loss(arrays._replace(subjects=named))

        (_, (outputs, after)), gradients = jax.value_and_grad(of_arrays, has_aux=True)(arrays)
        return outputs, after, gradients

    return jax.jit(run)


def results(x, mask, **options):
    return program(tuple(options.items()))(x, mask)


def values(x, mask=None, **options):
    return program(tuple(options.items()), False)(x, mask)


PLACES = 7
MASKS = {
    "fits": make_mask(chance=0.3),
    "too-many": make_mask(chance=0.8),
    "all-true": make_mask(chance=1.1),
    "all-false": make_mask(chance=0.0),
}
MASK = MASKS["fits"]
BOTH = make_mask(subjects=2)
assert MASK.sum(-1).max() <= PLACES < MASKS["too-many"].sum(-1).max()


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_fast_form_and_its_gradients_are_the_definition(mask, combine):
    with jax.enable_x64(True):
        x = make()
        got = results(x, mask, combine=combine, scale=0.7, max_tokens=PLACES)
        assert_close(got, results(x, mask, combine=combine, scale=0.7, implementation="reference"), 1e-10)
        np.testing.assert_allclose(got[0].image, in_numpy(x, mask, combine, 0.7), rtol=0, atol=1e-12)


SHAPES = {
    "everything": (make_all(), BOTH, {}),
    "first-step": (make(), None, {"max_tokens": 5}),
    "no-spatial": (make(spatial=0), MASK, {}),
    "no-subject": (make(subjects=()), None, {}),
    "neither": (make(subjects=(), spatial=0), None, {}),
    "one-token": (make(text=1, image=1, subjects=(1,), keywords=((IDS[:, :1] * 0, None),), own=True), None, {}),
    "longer-than-a-block": (make(image=131, spatial=0, subjects=(3,)), make_mask(131), {"max_tokens": 67}),
}


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(("x", "mask", "options"), SHAPES.values(), ids=SHAPES)
def test_every_stream_reads_what_it_should(x, mask, options, combine):
    with jax.enable_x64(True):
        for name in IMPLEMENTATIONS[: 2 if x.image.key.shape[1] == 1 or mask is BOTH else 1]:
            out, _ = values(x, mask, combine=combine, scale=0.7, implementation=name, **options)
            np.testing.assert_allclose(out.image, in_numpy(x, mask, combine, 0.7), rtol=0, atol=1e-12)
            base = (np.concatenate([getattr(x.text, n), getattr(x.image, n)], axis=1) for n in ("key", "value"))
            np.testing.assert_allclose(out.text, softmax(x.text.query, *base, 0.7), rtol=0, atol=1e-12)
            for s, y in zip((*x.spatial, *x.subjects), (*out.spatial, *out.subjects), strict=True):
                assert (y is None) == (s.query is None)
                if y is not None:
                    np.testing.assert_allclose(y, softmax(*s[:3], 0.7), rtol=0, atol=1e-12)


def test_in_float32_and_bfloat16():
    x, options = to_float32(make()), {"combine": "joint", "scale": 0.7}
    want = results(x, MASK, implementation="reference", **options)
    assert_close(results(x, MASK, max_tokens=PLACES, **options), want, 1e-5)
    half, _ = values(to_float32(x, jnp.bfloat16), MASK, max_tokens=PLACES, **options)
    for got, exact in zip(jax.tree.leaves(half), jax.tree.leaves(want[0]), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.sqrt(np.mean((got.astype(np.float32) - exact) ** 2) / np.mean(exact**2)) < 0.02


def test_logits_beyond_exp():
    x = to_float32(make(large=1000.0))
    got = results(x, MASK, combine="joint", scale=0.7, max_tokens=PLACES)
    assert 0.7 * np.abs(np.einsum("bikh,bjkh->bikj", x.image.query[:, :, ::2], x.text.key)).max() > 1000
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    np.testing.assert_allclose(got[0].image, in_numpy(to_float32(x, np.float64), MASK, "joint", 0.7), atol=2e-3)


def test_default_scale_and_scale_zero():
    x = to_float32(make())
    out, _ = values(x, MASK)
    np.testing.assert_allclose(out.image, in_numpy(x, MASK, "add", H**-0.5), atol=1e-5)
    out, _ = values(x, MASK, scale=0.0)
    np.testing.assert_allclose(out.image, in_numpy(x, MASK, "add", 0.0), atol=1e-5)


def test_aligned_attention_injects_values():
    query, key, value = stream(np.random.default_rng(0), L, dtype=np.float32)
    out = position_aligned_attention(query, key, value)
    np.testing.assert_array_equal(out, heads_alike(value))

    def loss(*x):
        return jnp.sum(jnp.sin(position_aligned_attention(*x)))

    d_query, d_key, d_value = jax.grad(loss, (0, 1, 2))(query, key, value)
    assert not np.any(d_query)
    assert not np.any(d_key)
    np.testing.assert_allclose(d_value, (N // K) * np.cos(value), rtol=1e-6)
    again, lse = position_aligned_attention(query, key, value, scale=0.3, return_lse=True)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_allclose(lse, 0.3 * np.einsum("blnh,blnh->bln", query, heads_alike(key)), rtol=1e-5, atol=1e-5)
    want = dot_product_attention(query, key, value, mask=np.eye(L, dtype=bool)[None, None])
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_only_joint_reads_what_aligned_keys_say():
    """Without the conditions' own outputs, in which keys take part whatever the combination."""
    x = to_float32(make(subjects=()))
    add, joint = (results(x, None, combine=combine)[2] for combine in COMBINE)
    assert not any(np.any(s.key) for s in add.spatial)
    assert all(np.any(s.key) for s in joint.spatial)
    assert all(np.any(s.value) for s in add.spatial)


def test_thresholds_at_the_ends():
    text, image = to_float32(make())[:2]
    ids = IDS[:, :2].clip(0, M - 1)
    everything = keyword_mask(image.query, text.key, ids, eps=0.0)
    assert np.all(everything)
    assert not np.any(keyword_mask(image.query, text.key, ids, eps=1.0001))
    assert np.all(np.sum(keyword_mask(image.query, text.key, ids, eps=1.0), axis=1) == 1)
    part = keyword_mask(image.query, text.key, ids)
    assert 0 < np.sum(part) < part.size
    assert inspect.signature(keyword_mask).parameters["eps"].default == 0.2
    subject = to_float32(make()).subjects[0]
    got = keyword_scoped_attention(image.query, subject.key, subject.value, everything)
    np.testing.assert_allclose(got, dot_product_attention(image.query, subject.key, subject.value), atol=1e-6)
    assert not np.any(keyword_scoped_attention(image.query, subject.key, subject.value, ~everything))


def relevance(query, key, ids, valid):
    r = np.zeros(query.shape[:2])
    for b in range(B):
        for i in {int(i) for i, v in zip(ids[b], valid[b], strict=True) if v}:
            r[b] += np.einsum("lnh,nh->l", query[b], np.repeat(key[b, i], N // K, axis=0)) / N
    return r


@pytest.mark.parametrize("normalization", ["minmax", "softmax"])
@pytest.mark.parametrize("eps", [0.05, 0.2, 0.35])
def test_the_mask_is_its_definition(eps, normalization):
    """One id stands twice, and the second row has one keyword and padding that is no position."""
    with jax.enable_x64(True):
        x = make(seed=4)
        r = relevance(x.image.query, x.text.key, IDS, VALID)
        assert not np.allclose(r[0], relevance(x.image.query, x.text.key, IDS[:, :1], VALID[:, :1])[0])
        low, high = r.min(1, keepdims=True), r.max(1, keepdims=True)
        weights = np.exp(r - high)
        norm = (r - low) / (high - low) if normalization == "minmax" else weights / weights.sum(1, keepdims=True)
        got = keyword_mask(x.image.query, x.text.key, IDS, keyword_valid=VALID, eps=eps, normalization=normalization)
        np.testing.assert_array_equal(got, norm >= eps)
        assert 0 < np.sum(got) < got.size


def test_softmax_of_many_tokens_selects_next_to_nothing():
    """The pitfall: 0.2 is far above the mean of 1024 weights that sum to 1, and an ordinary min-max threshold."""
    rng = np.random.default_rng(0)
    query, key = (0.3 * rng.standard_normal((1, s, N, H)).astype(np.float32) for s in (1024, M))
    ids = np.array([[2]])
    assert np.sum(keyword_mask(query, key, ids, normalization="softmax")) == 0
    assert np.mean(keyword_mask(query, key, ids)) > 0.5


def test_no_keyword_is_everything():
    """Whatever the threshold is; a row with a keyword passes none above 1."""
    x = to_float32(make())
    for ids in (None, np.zeros((B, 0), np.int32)):
        assert np.all(keyword_mask(x.image.query, x.text.key, ids, eps=1.5))
    for normalization in ("minmax", "softmax"):
        got = keyword_mask(
            x.image.query,
            x.text.key,
            IDS,
            keyword_valid=VALID & [[False], [True]],
            eps=1.5,
            normalization=normalization,
        )
        assert np.all(got[0])
        assert not np.any(got[1])


def test_constant_relevance_is_everything():
    query, key = np.ones((B, L, N, H), np.float32), np.ones((B, M, K, H), np.float32)
    assert np.all(keyword_mask(query, key, np.ones((B, 1), int), eps=1.0))
    assert not np.any(keyword_mask(query, key, np.ones((B, 1), int), eps=1.5))
    assert np.all(keyword_mask(query[:, :1], key, np.ones((B, 1), int)))


def test_ids_outside_are_nothing_under_jit():
    x = to_float32(make())
    got = jax.jit(keyword_mask)(x.image.query, x.text.key, np.array([[2, 99], [2, -1]]))
    np.testing.assert_array_equal(got, keyword_mask(x.image.query, x.text.key, np.full((B, 1), 2)))


@pytest.mark.parametrize("eps", [0.3, 0.5, 0.7])
def test_planted_tokens_are_found(eps):
    rng = np.random.default_rng(7)
    planted = rng.random((B, L)) < 0.4
    query, key = (0.05 * rng.standard_normal((B, s, n, H)) for s, n in ((L, N), (M, K)))
    way = rng.standard_normal(H)
    key[:, 3] += way / np.linalg.norm(way)
    query[planted] += way / np.linalg.norm(way)
    got = keyword_mask(query.astype(np.float32), key.astype(np.float32), np.full((B, 1), 3), eps=eps)
    np.testing.assert_array_equal(got, planted)


def test_the_mask_is_used_at_the_next_step():
    """The mask that comes back is of this step's queries; what this step reads is the mask that was given."""
    x, other = (to_float32(make(subjects=(17, 3), seed=seed)) for seed in (0, 9))
    first, mask = values(x)
    want = [keyword_mask(x.image.query, x.text.key, s.keyword_ids, keyword_valid=s.keyword_valid) for s in x.subjects]
    np.testing.assert_array_equal(mask, np.stack(want, axis=1))
    assert 0 < np.sum(mask) < mask.size
    assert_close(first.image, in_numpy(x, None, "add", H**-0.5), 1e-5)
    second, after = values(other, mask)
    assert_close(second.image, in_numpy(other, np.asarray(mask), "add", H**-0.5), 1e-5)
    assert np.any(after != mask)
    assert np.abs(second.image - in_numpy(other, np.asarray(after), "add", H**-0.5)).max() > 0.1


def test_without_subjects_the_mask_is_empty():
    outputs, mask = values(to_float32(make(subjects=())))
    assert mask.shape == (B, 0, L)
    again, _ = values(to_float32(make(subjects=())), mask)
    np.testing.assert_array_equal(outputs.image, again.image)


def test_rows_are_dropped_and_not_zeroed():
    query, key, value = stream(np.random.default_rng(0), L, dtype=np.float32)
    mask = MASK[:, 0]
    for options in ({}, {"max_tokens": 9}, {"implementation": "reference"}):
        out, lse = keyword_scoped_attention(query, key, value, mask, return_lse=True, **options)
        want, want_lse = dot_product_attention(query, key, value, return_lse=True)
        assert not np.any(out[~mask])
        assert np.all(np.isneginf(lse[~mask]))
        np.testing.assert_allclose(out[mask], want[mask], atol=1e-5)
        np.testing.assert_allclose(lse[mask], want_lse[mask], atol=1e-5)
    zeroed = dot_product_attention(query * mask[:, :, None, None], key, value)
    assert np.abs(zeroed[~mask]).max() > 0.1


@functools.cache
def scoped(**options):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(*x):
        out, lse = keyword_scoped_attention(*x, return_lse=True, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isfinite(lse), lse, 0))), (out, lse)

    return run


@pytest.mark.parametrize("max_tokens", [None, 1, 4, 50])
@pytest.mark.parametrize("chance", [0.0, 0.2, 1.0])
def test_places_bound_the_cost_and_not_the_result(max_tokens, chance):
    with jax.enable_x64(True):
        x = stream(np.random.default_rng(0), L)
        mask = np.random.default_rng(3).random((B, L)) < chance
        got, want = (
            scoped(**options)(*x, mask) for options in ({"max_tokens": max_tokens}, {"implementation": "reference"})
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
        assert not np.any(got[0][1][0][~mask])


@pytest.mark.parametrize("combine", COMBINE)
def test_the_order_of_tokens(combine):
    with jax.enable_x64(True):
        x = make()
        out, after = values(x, MASK, combine=combine, max_tokens=9)
        order = np.random.default_rng(0).permutation(L)
        image, *spatial = (jax.tree.map(lambda a: a[:, order], s) for s in (x.image, *x.spatial))
        moved, moved_after = values(
            x._replace(image=image, spatial=tuple(spatial)), MASK[..., order], combine=combine, max_tokens=9
        )
        np.testing.assert_allclose(moved.image, out.image[:, order], atol=1e-12)
        np.testing.assert_array_equal(moved_after, after[..., order])
        alone, _ = values(x._replace(image=image), MASK[..., order], combine=combine, max_tokens=9)
        assert np.abs(alone.image - moved.image).max() > 0.01
        shuffled = np.random.default_rng(1).permutation(17)
        first = x.subjects[0]
        first = first._replace(key=first.key[:, shuffled], value=first.value[:, shuffled])
        same, _ = values(x._replace(subjects=(first,)), MASK, combine=combine, max_tokens=9)
        np.testing.assert_allclose(same.image, out.image, atol=1e-12)


def test_conditions_depend_on_themselves_only():
    x, other = to_float32(make_all()), to_float32(make_all(seed=5))
    out, _ = values(x, BOTH)
    changed, _ = values(x._replace(image=other.image, text=other.text), ~BOTH)
    for a, b in zip((*out.spatial, *out.subjects), (*changed.spatial, *changed.subjects), strict=True):
        np.testing.assert_array_equal(a, b)
    mixed, _ = values(x._replace(spatial=(other.spatial[0], x.spatial[1])), BOTH)
    np.testing.assert_array_equal(mixed.spatial[1], out.spatial[1])
    np.testing.assert_array_equal(mixed.text, out.text)
    assert np.any(mixed.spatial[0] != out.spatial[0])


def test_two_subjects_have_a_mask_each():
    x = to_float32(make(subjects=(17, 3)))
    only_second = np.stack([np.zeros((B, L), bool), np.ones((B, L), bool)], axis=1)
    got, _ = values(x, only_second, combine="joint")
    alone, _ = values(x._replace(subjects=x.subjects[1:]), None, combine="joint")
    np.testing.assert_allclose(got.image, alone.image, atol=1e-5)


def test_vmap_and_forward_mode():
    x = to_float32(make())
    mask = jnp.asarray(MASK)
    run = functools.partial(pka_attention, combine="joint", max_tokens=9)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), (x, mask))
    both, masks = jax.jit(jax.vmap(run))(*stacked)
    for i, turn in enumerate((1, -1)):
        one, after = values(jax.tree.map(lambda a, turn=turn: a[::turn], x), mask[::turn], combine="joint")
        assert_close(jax.tree.map(lambda a, i=i: a[i], both), one, 1e-5)
        np.testing.assert_array_equal(masks[i], after)

    @jax.jit
    def image_of(query):
        streams = x._replace(image=x.image._replace(query=query))
        return pka_attention(streams, mask, implementation="reference")[0].image

    way = np.random.default_rng(0).standard_normal(x.image.query.shape).astype(np.float32)
    _, along = jax.jvp(image_of, (x.image.query,), (way,))
    ahead, back = image_of(x.image.query + 1e-2 * way), image_of(x.image.query - 1e-2 * way)
    np.testing.assert_allclose(along, (ahead - back) / 2e-2, atol=2e-3)


def test_in_shard_map_over_rows():
    x = to_float32(make())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    on_mesh = jax.shard_map(
        functools.partial(pka_attention, combine="joint", max_tokens=5),
        mesh=mesh, in_specs=P("data"), out_specs=P("data"),
    )  # fmt: skip
    assert_close(jax.jit(on_mesh)(x, MASK), values(x, MASK, combine="joint"), 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_a_mesh(kind):
    x = to_float32(make(subjects=(17, 3), keywords=((IDS, VALID), (None, None))))
    mask = make_mask(subjects=2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, mask), NamedSharding(mesh, P("data")))
        outputs, after = jax.jit(functools.partial(pka_attention, combine="joint", max_tokens=7))(*placed)
        assert after.sharding.spec[0] == "data"
    want = values(x, mask, combine="joint")
    assert_close(jax.device_get((outputs, after)), want, 1e-5)


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("subjects", [(17,), ()])
def test_heads_on_a_mesh_of_explicit_axes(subjects, is_set):
    """Of which the mask is the mean, so that it takes a sum over devices; with the mesh around, and without."""
    x = to_float32(make(subjects=subjects))
    mesh = jax.make_mesh((3,), ("tensor",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3])
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        places = jax.tree.map(lambda a: NamedSharding(mesh, P(None, None, "tensor") if a.ndim == 4 else P()), x)
        got = jax.device_get(jax.jit(pka_attention)(jax.device_put(x, places)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(values(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_explain_names_both():
    x = to_float32(make())
    decision = jattn.explain(pka_attention, x, MASK)[0]
    assert decision.op == "pka_attention"
    assert decision.chosen["tpu"] == "xla"
    assert decision.passed_over == ("reference",)


GOOD = to_float32(make_all())


def spatial(**change):
    return {"streams": GOOD._replace(spatial=(GOOD.spatial[0], GOOD.spatial[1]._replace(**change)))}


def subject(**change):
    return {"streams": GOOD._replace(subjects=(GOOD.subjects[0]._replace(**change), GOOD.subjects[1]))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"streams": tuple(GOOD)}, TypeError, "streams: expected jattn.sparse.pka_streams.Streams, got tuple"),
        ({"streams": GOOD._replace(text=None)}, TypeError, "streams.text: expected a Stream, got NoneType"),
        ({"streams": GOOD._replace(spatial=GOOD.image)}, TypeError, r"streams.spatial\[0\]: expected a Stream"),
        ({"streams": GOOD._replace(subjects=GOOD.spatial)}, TypeError, r"streams.subjects\[0\]: expected a Subject"),
        ({"streams": GOOD._replace(image=GOOD.image._replace(query=None))}, ValueError, "streams.image.query: only"),
        ({"streams": GOOD._replace(text=Stream(*(a[:, :0] for a in GOOD.text)))}, ValueError, "dimension M is 0"),
        (
            {"streams": GOOD._replace(spatial=(Stream(*(a[:, :5] for a in GOOD.image)),))},
            ValueError,
            r"streams.spatial\[0\].key: 5 tokens, and the image has 13; resize the condition to the image's grid",
        ),
        (spatial(value=GOOD.image.value[..., :4]), ValueError, r"streams.spatial\[1\].value: expected .* V = 11"),
        (spatial(key=GOOD.image.key.astype(jnp.bfloat16)), TypeError, r"streams.spatial\[1\].key: expected dtype"),
        (spatial(key=[1.0]), TypeError, r"streams.spatial\[1\].key: expected an array"),
        (subject(keyword_ids=IDS.astype(np.float32)), TypeError, r"subjects\[0\].keyword_ids: expected an integer"),
        (subject(keyword_ids=IDS[:1]), ValueError, r"subjects\[0\].keyword_ids: expected \[B, W\] with B = 2"),
        (subject(keyword_valid=None), ValueError, r"subjects\[0\].keyword_ids: expected positions of the 5 text"),
        (subject(keyword_valid=IDS), TypeError, r"subjects\[0\].keyword_valid: expected booleans, got int32"),
        (subject(keyword_ids=None), ValueError, r"subjects\[0\].keyword_valid: says which keyword_ids count"),
        ({"mask": BOTH[:, :1]}, ValueError, "mask: expected .* J = 2"),
        ({"mask": BOTH.astype(np.float32)}, TypeError, "mask: expected booleans, got float32"),
        ({"combine": "mean"}, ValueError, "combine: expected one of 'add', 'joint', got 'mean'"),
        ({"normalization": "l2"}, ValueError, "normalization: expected one of 'minmax', 'softmax', got 'l2'"),
        ({"eps": jnp.ones(())}, TypeError, "eps: expected a static number"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number, got nan"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"max_tokens": 2.0}, TypeError, "max_tokens: expected a static integer, got float"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
        ({"implementation": "pallas"}, NotImplementedError, "pka_attention has no such implementation"),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    with pytest.raises(error, match=message):
        pka_attention(**({"streams": GOOD, "mask": BOTH} | change))


def test_what_is_wrong_in_the_parts_is_named():
    query, key, value = GOOD.image
    with pytest.raises(ValueError, match="key: 12 tokens on a grid of their own for 13 queries; resize"):
        position_aligned_attention(query, key[:, 1:], value[:, 1:])
    with pytest.raises(ValueError, match=r"mask: expected \[B, L\] with L = 13"):
        keyword_scoped_attention(query, key, value, MASK[:, 0, 1:])
    with pytest.raises(ValueError, match="keyword_ids: expected positions of the 13 text tokens"):
        keyword_mask(query, key, np.array([[3], [13]]))
    with pytest.raises(ValueError, match="query: 4 heads cannot be shared by 3"):
        keyword_mask(query[:, :, :4], key, np.array([[3], [1]]))
