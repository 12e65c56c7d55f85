"""How the activations of a model lie on a mesh, for as long as a context lasts.

A model is written without a word about devices. Left alone, the compiler lays activations out as it likes: it splits
the width as the weights of the embedding are split, and then moves activations instead of weights; and it gathers a
split sequence at every step of a scan along it. Within `use_layout` the residual stream stays split by rows and tokens,
and mixers run their op on the mesh by `shard_attention`.

    with use_layout(Layout(mesh, batch=("data", "fsdp"), heads="tensor", context="context")):
        losses = model.loss(tokens, targets)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jattn.sharding import reads_heads, shard_attention


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of `mesh` split what.

    Attributes:
      batch: rows.
      heads: heads of queries, keys and values; left out by mixers whose heads do not divide.
      context: tokens.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: str
    context: str

    def size(self, *axes: str) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Models called in this context, from the same thread, lie on the mesh as `layout` says."""
    described = jax.sharding.get_abstract_mesh()
    if not described.empty:  # JAX wants its own context's mesh: that of devices which are described but not here
        layout = dataclasses.replace(layout, mesh=described)
    token = _current.set(layout if layout.mesh.size > 1 else None)
    try:
        yield
    finally:
        _current.reset(token)


def pin(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`x` with whole channels on every device; without a layout, `x`."""
    layout = _current.get()
    if layout is None:
        return x
    spec = PartitionSpec(layout.batch, layout.context, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def each_token(
    loss: Callable[[Array, Array, Array], Array],
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """`loss(hidden, head, targets)`, every device for its own tokens.

    The head is gathered once and its gradient summed once; the vocabulary may stay split. A loop over slices of all
    tokens, as the compiler would have it, gathers and sums at each of them.
    """
    layout = _current.get()
    if layout is None or layout.size(*layout.batch, layout.context) == 1:  # one device has them all
        return loss(hidden, head, targets)
    tokens = PartitionSpec(layout.batch, layout.context)
    on_mesh = jax.shard_map(
        loss,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(layout.batch, layout.context, None), PartitionSpec(), tokens),
        out_specs=tokens,
        axis_names={*layout.batch, layout.context},
    )
    return on_mesh(hidden, head, targets)


def attend(
    op: Callable[..., Any],
    query: Float[Array, "B *T N H"],
    key: Float[Array, "B *T K H"],
    value: Float[Array, "B *T K V"],
    *,
    arrays: dict[str, Any],
    **options: Any,
) -> Any:
    """`op(query, key, value, **arrays, **options)`, on the mesh where there is a layout.

    Every device runs the op for its own rows, heads and tokens: kernels cannot be split by the compiler.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    layout = _current.get()
    if layout is None:
        return op(query, key, value, **given, **options)
    context = layout.context if layout.size(layout.context) > 1 else None
    if context is not None and "initial_state" in given:  # a prompt is read by the compiler's own splitting
        return op(query, key, value, **given, **options)
    split = layout.size(layout.heads)
    by_head = any(x.shape[-2] % split for x in (query, key, value))
    asks = any(reads_heads(options.get(name)) for name in ("mask", "block_mask"))
    heads = None if by_head or asks else layout.heads
    batch = None if query.shape[0] % layout.size(*layout.batch) else layout.batch
    on_mesh = shard_attention(op, layout.mesh, batch=batch, heads=heads, context=context, **options)
    return on_mesh(query, key, value, **given)
