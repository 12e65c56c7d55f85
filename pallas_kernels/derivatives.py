"""What the custom derivatives of all kernels share.

A kernel has first derivatives, backward. JAX differentiates every branch of a program that compiles for several
platforms, so that a derivative of higher order must be traced where it can't be had; it is refused where it would run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def zeros_for_symbols(cotangents: tuple[Any, ...]) -> tuple[Array, ...]:
    """The cotangents, with arrays of zeros for those that nothing depends on."""
    return tuple(
        jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents
    )


def noted(truth: bool) -> Array:
    """A bool that the forward pass leaves for the backward pass: `was_noted` reads it off the shape of an empty array.

    Not off the structure of what is kept: of a traced call JAX remembers one structure, that of the pass it traced
    last, whatever was to be differentiated in the others.
    """
    return jnp.zeros((0, int(truth)))


def was_noted(note: Array) -> bool:
    return note.shape[1] == 1


def once(run: Callable[..., Any], *operands: Any) -> Any:
    """`run(*operands)`, a part of a kernel's forward or backward pass; its own derivatives are refused."""

    @jax.custom_jvp
    def opaque(*operands: Any) -> Any:
        return run(*operands)

    @opaque.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        results = opaque(*primals)
        leaves, tree = jax.tree.flatten(results)
        moved = [x for x in jax.tree.leaves(tangents) if x.dtype != jax.dtypes.float0]
        found = _refused.bind(*moved, avals=tuple(jax.typeof(x) for x in leaves))
        return results, jax.tree.unflatten(tree, found)

    return opaque(*operands)


_refused = Primitive("derivative_of_a_kernel")
"""Linear, of any arrays to arrays that are `avals`."""
_refused.multiple_results = True
_refused.def_abstract_eval(lambda *_, avals: avals)


def _refuse(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "kernels have first derivatives, backward, and no others; name implementation='xla' or 'reference' for those"
    )


def _transpose(cotangents: Sequence[Any], *operands: Any, avals: Any) -> Sequence[Any]:
    given = [ad.instantiate_zeros(x) for x in cotangents]
    return _refused.bind(*given, avals=tuple(x.aval for x in operands))


def _batch(operands: Sequence[Any], axes: Sequence[int | None], avals: Any) -> tuple[Any, Any]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    many = tuple(aval.update(shape=(size, *aval.shape)) for aval in avals)
    return _refused.bind(*moved, avals=many), [0] * len(many)


ad.deflinear2(_refused, _transpose)
batching.primitive_batchers[_refused] = _batch
_refused.def_impl(_refuse)
mlir.register_lowering(_refused, _refuse)
