"""How the kernels cut a problem up."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One grid step: `chunks` chunks of `chunk` tokens, for `heads` key heads.

    Attributes:
      lag: how many (chunk, head) units ahead the scores are computed.
      vmem: bytes of on-chip memory that the kernel may take.
    """

    chunk: int
    chunks: int
    heads: int
    lag: int
    vmem: int = 64 * 2**20

    @property
    def tokens(self) -> int:
        return self.chunk * self.chunks


def choose(length: int, heads: int) -> Tiling:
    raise NotImplementedError
