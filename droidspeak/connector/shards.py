"""Tensor-parallel shards: which KV heads each holds, and how shards of one degree are made of another's.

KV heads are split as vLLM splits them: rank by rank, and with more ranks than heads, neighbouring ranks share
one. E is whole in every shard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from droidspeak.errors import ConfigError

__all__ = ["Part", "Shard"]

_SHARD = re.compile(r"([0-9]{1,4})of([0-9]{1,4})")


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `rank` of `size`."""

    rank: int
    size: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `"<rank>of<size>"`. Raises `ConfigError`."""
        match = _SHARD.fullmatch(text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(
                f"shard {text!r}: allowed is RANKofSIZE with a rank below the size, such as 0of1"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.rank}of{self.size}"

    def heads(self, kv_heads: int) -> range:
        """The heads of the model that it holds."""
        count = max(1, kv_heads // self.size)
        first = self.rank * kv_heads // self.size
        return range(first, first + count)

    def parts(self, size: int, kv_heads: int) -> list[Part]:
        """Shards of a degree of `size` that together hold the heads of this one."""
        mine = self.heads(kv_heads)
        if size == self.size:
            return [Part(self, slice(0, len(mine)), slice(0, len(mine)))]
        parts = []
        head = mine.start
        for shard in (Shard(rank, size) for rank in range(size)):
            held = shard.heads(kv_heads)
            if head in held and head in mine:
                end = min(held.stop, mine.stop)
                its, own = (slice(head - part.start, end - part.start) for part in (held, mine))
                parts.append(Part(shard, its, own))
                head = end
        return parts


@dataclass(frozen=True, slots=True)
class Part:
    """Some heads of a shard.

    Attributes:
        shard: that holds them.
        held: where they are among its heads.
        own: where they belong among the heads of whoever asked.
    """

    shard: Shard
    held: slice
    own: slice
