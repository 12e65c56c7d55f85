"""Which implementation of an op runs, and why the others do not.

An op lists its `Implementation`s, fastest first. `implementation=None` takes, for every platform, the first one that
belongs there and does not refuse the call; the platform itself is settled while lowering, so one program compiles for
a device that is not present. A name, or a sequence of names tried in order, is taken at its word: a name never falls
back to something that was not named. Only `NotImplementedError` means "I do not do that"; any other error surfaces.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

NAMES = ("reference", "xla", "pallas", "pallas_tpu", "pallas_gpu", "interpret")
PLATFORMS = ("cpu", "tpu", "cuda")
_HOME = {"pallas_tpu": ("tpu",), "pallas_gpu": ("cuda",)}
_EXPANSION = {"pallas": ("pallas_tpu", "pallas_gpu")}

Choice = str | Sequence[str] | None


def _accepts(*args: Any, **options: Any) -> None:
    """The check of an implementation that does everything the op does."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: one of `NAMES` except "pallas".
      run: the function, called as `run(*arrays, **options)`.
      check: called likewise before `run`; raises `NotImplementedError` with the reason when it does not do the call.
    """

    name: str
    run: Callable[..., Any]
    check: Callable[..., None] = _accepts

    @property
    def platforms(self) -> tuple[str, ...]:
        return _HOME.get(self.name, PLATFORMS)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `dispatch` settled for one call: the choice on every platform, and a reason for every refusal."""

    op: str
    arguments: str
    chosen: dict[str, str]
    refused: dict[str, str]
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.op}({self.arguments})"]
        lines += [f"  {platform:<5}runs {self.chosen.get(platform, 'nothing')}" for platform in PLATFORMS]
        lines += [f"  {name} is not used: {reason}" for name, reason in self.refused.items()]
        lines += [f"  {name} would do it too; it comes later in the order" for name in self.passed_over]
        return "\n".join(lines)


_decisions: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar("jattn_decisions", default=None)


def _describe(arrays: Sequence[Any]) -> str:
    leaves = jax.tree.leaves(arrays)
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves if hasattr(leaf, "dtype"))


def _candidates(op: str, table: dict[str, Implementation], choice: Choice) -> list[str]:
    """The names to try, in order, with "pallas" written out."""
    if choice is None:
        return list(table)
    if not isinstance(choice, (str, Sequence)):
        raise TypeError(f"implementation: expected None, a name or a sequence of names, got {type(choice).__name__}")
    names = [choice] if isinstance(choice, str) else list(choice)
    if not names:
        raise ValueError(f"implementation: {op} was given an empty sequence; pass None or at least one of {NAMES}")
    for name in names:
        if name not in NAMES:
            raise ValueError(f"implementation: expected one of {', '.join(NAMES)}, got {name!r}")
    return [full for name in names for full in _EXPANSION.get(name, (name,))]


def _check_whole(platforms: tuple[str, ...]) -> None:
    """Raises `NotImplementedError` where the compiler may be asked to split the call."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in (*mesh.auto_axes, *mesh.explicit_axes))
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here in platforms and not mesh.manual_axes:
        devices = max(devices, jax.device_count())
    if devices > 1:
        raise NotImplementedError(
            f"the compiler cannot split a kernel over {devices} devices; run it by jattn.sharding.shard_attention, or "
            "name the implementation where all of it is on one device"
        )


def on_mesh_of(arrays: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Outside of any mesh, that of arrays with explicit axes: what an op makes itself has its place there too."""
    if jax.sharding.get_abstract_mesh().empty:
        for leaf in jax.tree.leaves(arrays):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext()


def over_mesh(f: Any, out_sharding: Any, *args: Any) -> Any:
    """`f(*args)`; how it is split over explicit mesh axes, the compiler finds out, but for what it returns.

    For sorting, gathers, scatters and sums of which JAX cannot say where they are.
    """
    axes = jax.sharding.get_abstract_mesh().explicit_axes
    if axes:
        f = jax.sharding.auto_axes(f, axes=axes, out_sharding=out_sharding)
    return f(*args)


def dispatch(op: str, implementations: Sequence[Implementation], choice: Choice, *arrays: Any, **options: Any) -> Any:
    """Run the implementation of `op` that `choice` names or, for `None`, the first that fits each platform.

    Args:
      op: the op's public name, for messages.
      implementations: fastest first.
      choice: the op's `implementation=` argument.
      arrays: traced arguments; `None` and pytrees are allowed.
      options: static arguments.

    Raises:
      ValueError: `choice` holds a name that does not exist.
      NotImplementedError: nothing that was named does this call; every reason is listed.
    """
    with on_mesh_of(arrays):
        return _dispatch(op, implementations, choice, *arrays, **options)


def _dispatch(op: str, implementations: Sequence[Implementation], choice: Choice, *arrays: Any, **options: Any) -> Any:
    table = {implementation.name: implementation for implementation in implementations}
    refused: dict[str, str] = {}
    accepted: list[Implementation] = []
    for name in _candidates(op, table, choice):
        if name not in table:
            refused[name] = f"{op} has no such implementation, it has {', '.join(table)}"
            continue
        try:
            if choice is None and name in _HOME:
                _check_whole(_HOME[name])
            table[name].check(*arrays, **options)
        except NotImplementedError as reason:
            refused[name] = str(reason)
        else:
            accepted.append(table[name])
    if not accepted:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise NotImplementedError(f"implementation: nothing named does this call of {op}:\n{reasons}")

    chosen: dict[str, Implementation] = {}
    for platform in PLATFORMS:
        at_home = [implementation for implementation in accepted if platform in implementation.platforms]
        if at_home:
            chosen[platform] = at_home[0]
    log = _decisions.get()
    if log is not None:
        used = {implementation.name for implementation in chosen.values()}
        log.append(
            Decision(
                op=op,
                arguments=_describe(arrays),
                chosen={platform: implementation.name for platform, implementation in chosen.items()},
                refused=refused,
                passed_over=tuple(i.name for i in accepted if i.name not in used),
            )
        )

    here = jax.default_backend()
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))
    if here in PLATFORMS and here not in chosen and not is_traced:
        names = ", ".join(implementation.name for implementation in chosen.values())
        raise NotImplementedError(
            f"implementation: {names} of {op} runs on {', '.join(chosen)}, and this is {here}; "
            "None takes what runs here"
        )
    # While explaining, the ops inside of this one are to be seen, and a cached trace would not show them.
    run = _compiled if log is None and _is_hashable(options) else _run
    branches = tuple((platform, implementation.run) for platform, implementation in chosen.items())
    return run(branches, tuple(options.items()), *arrays)


def _run(
    branches: tuple[tuple[str, Callable[..., Any]], ...], options: tuple[tuple[str, Any], ...], *arrays: Any
) -> Any:
    """The branch of the platform that is compiled for."""
    functions = {platform: functools.partial(run, **dict(options)) for platform, run in branches}
    if len(functions) < len(PLATFORMS):
        return jax.lax.platform_dependent(*arrays, **functions)
    # What runs on CPU runs everywhere: on platforms that have nothing of their own, too.
    runs = dict(branches)
    special = {platform: functions[platform] for platform in PLATFORMS if runs[platform] is not runs["cpu"]}
    if not special:
        return functions["cpu"](*arrays)
    return jax.lax.platform_dependent(*arrays, default=functions["cpu"], **special)


# Outside of `jit` a call is one program, compiled once; anywhere, calls that are alike are traced once.
_compiled = jax.jit(_run, static_argnums=(0, 1))


def _is_hashable(options: dict[str, Any]) -> bool:
    try:
        hash(tuple(options.values()))
    except TypeError:
        return False
    return True


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Decision]:
    """What every op inside `op(*args, **kwargs)` would run on each platform, and why the others would not.

    `op` may be a single op or a whole model: it is traced without being run. Print the decisions to read them.

    >>> print(*jattn.explain(jattn.dot_product_attention, query, key, value), sep="\\n")
    """
    log: list[Decision] = []
    token = _decisions.set(log)
    try:
        # A fresh function each time: a cached trace would make no decisions.
        inner = getattr(op, "__wrapped__", op) if isinstance(op, jax.stages.Wrapped) else op
        jax.eval_shape(lambda *arrays: inner(*arrays, **kwargs), *args)
    finally:
        _decisions.reset(token)
    return log
