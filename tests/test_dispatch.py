"""Choosing an implementation: order, platforms, refusals, and that no error is ever swallowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.dispatch import Implementation, dispatch, explain


def refuse(reason):
    def check(*args, **options):
        raise NotImplementedError(reason)

    return check


def constant(value):
    return lambda x, **options: x * 0 + value


FAST = Implementation("xla", constant(1.0))
SLOW = Implementation("reference", constant(2.0))
TPU = Implementation("pallas_tpu", constant(3.0))
GPU = Implementation("pallas_gpu", constant(4.0))


def op(x, implementations=(TPU, GPU, FAST, SLOW), implementation=None):
    return dispatch("op", implementations, implementation, x)


def test_none_takes_the_first_that_is_at_home():
    assert op(jnp.ones(())) == 1.0
    (decision,) = explain(op, jnp.ones(()))
    assert decision.chosen == {"cpu": "xla", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}
    assert decision.passed_over == ("reference",)


def test_a_kernel_runs_unasked_only_where_the_compiler_does_not_split():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def chosen(op, **how):
        rows = jax.sharding.PartitionSpec("data")
        mapped = jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows, **how) if how else op
        (decision,) = explain(mapped, jnp.ones(8))
        return decision

    with jax.set_mesh(mesh):
        decision = chosen(op)
        assert decision.chosen == {"cpu": "xla", "tpu": "xla", "cuda": "xla"}
        assert "cannot split a kernel over 8 devices; run it by jattn.sharding" in decision.refused["pallas_tpu"]
        assert chosen(lambda x: op(x, implementation=("pallas", "xla"))).chosen["tpu"] == "pallas_tpu"
    assert chosen(op, axis_names={"data", "tensor"}).chosen["tpu"] == "pallas_tpu"
    assert "over 4 devices" in chosen(op, axis_names={"data"}).refused["pallas_gpu"]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_platform_is_settled_while_lowering(platform):
    lowered = jax.jit(op).trace(jnp.ones(())).lower(lowering_platforms=(platform,)).as_text()
    expected = {"cpu": "1.0", "tpu": "3.0", "cuda": "4.0"}
    assert [value for value in ("1.0", "2.0", "3.0", "4.0") if f"dense<{value}" in lowered] == [expected[platform]]


def test_a_name_is_taken_at_its_word():
    assert op(jnp.ones(()), implementation="reference") == 2.0
    with pytest.raises(NotImplementedError, match="xla: not this one"):
        op(jnp.ones(()), (Implementation("xla", constant(1.0), refuse("not this one")), SLOW), "xla")


def test_a_sequence_is_tried_in_order():
    implementations = (Implementation("xla", constant(1.0), refuse("no")), SLOW)
    assert op(jnp.ones(()), implementations, ("xla", "reference")) == 2.0


def test_pallas_means_the_kernel_of_each_platform():
    (decision,) = explain(lambda x: op(x, implementation=("pallas", "xla")), jnp.ones(()))
    assert decision.chosen == {"tpu": "pallas_tpu", "cuda": "pallas_gpu", "cpu": "xla"}


def test_every_reason_is_listed():
    implementations = (Implementation("xla", constant(1.0), refuse("too wide")),)
    with pytest.raises(NotImplementedError, match=r"(?s)interpret: op has no such implementation.*xla: too wide"):
        op(jnp.ones(()), implementations, ("interpret", "xla"))


@pytest.mark.parametrize(("choice", "message"), [("fast", "got 'fast'"), ((), "empty sequence")])
def test_unknown_names(choice, message):
    with pytest.raises(ValueError, match=message):
        op(jnp.ones(()), implementation=choice)


@pytest.mark.parametrize("choice", [3, True, {"xla"}])
def test_a_choice_of_the_wrong_type(choice):
    with pytest.raises(TypeError, match="implementation: expected None, a name or a sequence of names, got"):
        op(jnp.ones(()), implementation=choice)


def test_other_errors_surface():
    def broken(*args, **options):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        op(jnp.ones(()), (Implementation("xla", constant(1.0), broken), SLOW))


def test_explain_sees_inside_jit_and_says_why():
    implementations = (Implementation("pallas_tpu", constant(3.0), refuse("heads too small")), FAST)
    jitted = jax.jit(lambda x: op(x, implementations))
    jitted(jnp.ones(()))
    (decision,) = explain(jitted, jnp.ones(()))
    assert "pallas_tpu is not used: heads too small" in str(decision)
    assert "tpu  runs xla" in str(decision)


def test_calls_that_are_alike_are_traced_once_and_explained_all_the_same():
    traced = []

    def inner(x, **options):
        traced.append(options)
        return op(x)

    outer = (TPU, Implementation("xla", inner))

    def call(x, **options):
        return dispatch("outer", outer, None, x, **options)

    for _ in range(2):
        assert call(jnp.ones(3), scale=2.0) == pytest.approx(jnp.ones(3))
    assert traced == [{"scale": 2.0}]
    assert [decision.op for decision in explain(call, jnp.ones(3), scale=2.0)] == ["outer", "op"]
    # What cannot be remembered is traced every time.
    for _ in range(2):
        call(jnp.ones(3), scale=[2.0])
    assert traced[-2:] == [{"scale": [2.0]}] * 2


@pytest.mark.parametrize("spec", [jax.P("data"), jax.P(None, None, "data")])
@pytest.mark.parametrize("name", ["linear_attention", "delta_rule", "dot_product_attention"])
def test_arrays_with_explicit_axes_need_no_mesh_around(name, spec):
    """Their own is the one in which the op makes what it makes."""
    run = getattr(jattn, name)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(0), (2, 70, 2, 4)) / 2

    def both(x):
        loss = lambda x: jnp.sum(jnp.sin(run(x, x, x)))  # noqa: E731
        return run(x, x, x), jax.grad(loss)(x)

    got, want = jax.jit(both)(jax.device_put(x, jax.NamedSharding(mesh, spec))), jax.jit(both)(x)
    assert all(tuple(array.sharding.spec)[: len(spec)] == tuple(spec) for array in got)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), got, want)
