"""One call of a linear op by its mixer: over the whole, from a state, or for one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from jattn.linear.arguments import LinearState
from jattn.nn.layout import attend


def attend_carried(
    op: Callable[..., Any],
    step: Callable[..., Any],
    heads: Sequence[Float[Array, "B T _ _"]],
    gates: Mapping[str, Array | None],
    *,
    segment_ids: Int[Array, "B T"] | None,
    state: LinearState | None,
    **options: Any,
) -> tuple[Float[Array, "B T O V"], LinearState | None]:
    """What the heads read, and the state after the last token when one was given.

    Args:
      op, step: a variant and its form for one token.
      heads: query, key and value.
      gates: what else the op reads, by argument name: `[heads]` or with a batch and a time axis in front.
      options: static options of both.
    """
    query, key, value = heads
    arrays: dict[str, Any] = {**gates, "segment_ids": segment_ids}
    if state is None:
        return attend(op, query, key, value, arrays=arrays, **options), None
    if query.shape[1] == 1:
        token = {name: gate if gate is None or gate.ndim == 1 else gate[:, 0] for name, gate in gates.items()}
        out, state = step(query[:, 0], key[:, 0], value[:, 0], state, **token, **options)
        return out[:, None], state
    return attend(op, query, key, value, arrays=arrays | {"initial_state": state}, return_state=True, **options)
