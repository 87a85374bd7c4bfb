"""Keys: the prefix hash chain and the key of one chunk.

A prefix is cut into chunks of `chunk_size` tokens. Chunk *i* is named by a SHA-256 link over the
link before it and its own token ids, so one name stands for the whole prefix up to its last token:

    link[-1] = sha256(seed, salt)
    link[i]  = sha256(link[i-1], little-endian int32 token ids of chunk i)

The tenant's salt enters the first link: whoever lacks it cannot even ask. Tokens after the last
full chunk have no name and are always prefilled.
"""

from __future__ import annotations

import hashlib
import re
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NewType, TypeAlias, cast

from droidspeak.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    TokenIds: TypeAlias = Sequence[int] | np.ndarray[Any, Any] | torch.Tensor
else:
    # Who names keys only, the command line above all, does without the seconds that torch takes.
    TokenIds = Any

__all__ = ["DEFAULT_CHUNK_SIZE", "ChunkKey", "PrefixHasher", "SourceId", "TokenIds", "salt_tag"]

SourceId = NewType("SourceId", str)
"""SHA-256 (64 hex digits) of a `SourceManifest`."""

DEFAULT_CHUNK_SIZE = 256
_SEED = b"droidspeak prefix 1"
_TAG_SEED = b"droidspeak salt tag 1"
_KEY = re.compile(r"[0-9a-f]{64}/[0-9]{1,4}of[0-9]{1,4}/[0-9a-f]{64}")


class PrefixHasher:
    """Names every full chunk of a prefix.

    Args:
        chunk_size: tokens per chunk, a power of two from 16.
        salt: the tenant's secret; the empty salt is the shared namespace.
    """

    def __init__(self, chunk_size: int = DEFAULT_CHUNK_SIZE, salt: str = "") -> None:
        if chunk_size < 16 or chunk_size & (chunk_size - 1):
            raise UsageError(f"chunk size {chunk_size}: allowed are powers of two from 16")
        self.chunk_size = chunk_size
        encoded = salt.encode()
        self._root = hashlib.sha256(_SEED + len(encoded).to_bytes(4, "little") + encoded).digest()

    def hashes(self, token_ids: TokenIds) -> list[str]:
        """The hex links of all full chunks of `token_ids`, in order.

        Raises:
            UsageError: a token id that is negative or does not fit in 31 bits.
        """
        data = _little_endian_int32(token_ids)
        width = 4 * self.chunk_size
        link, links = self._root, []
        for start in range(0, len(data) - width + 1, width):
            state = hashlib.sha256(link)
            state.update(data[start : start + width])
            link = state.digest()
            links.append(link.hex())
        return links


def salt_tag(salt: str) -> str:
    """16 hex digits that tell a tenant's chunks from others' and do not tell its salt; empty for none.

    As of any digest, a salt that can be guessed can be found again from it.
    """
    return hashlib.sha256(_TAG_SEED + salt.encode()).hexdigest()[:16] if salt else ""


def _little_endian_int32(token_ids: TokenIds) -> memoryview:
    import numpy as np

    # Nobody has a tensor where torch was never imported.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    if not isinstance(token_ids, np.ndarray):
        return _from_sequence(cast("Sequence[int]", token_ids))
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        kind = f"{token_ids.ndim}-d {token_ids.dtype}"
        raise UsageError(f"token ids must be a flat list of integers, not {kind}")
    if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= 2**31):
        raise UsageError("token ids must lie in 0 .. 2**31 - 1")
    return np.ascontiguousarray(token_ids, dtype="<i4").data.cast("B")


def _from_sequence(token_ids: Sequence[int]) -> memoryview:
    if isinstance(token_ids, bytes | bytearray):  # `array` would take them for machine integers
        raise UsageError("token ids must be integers, not bytes")
    try:
        values = array("i", token_ids)
    except (OverflowError, TypeError) as error:
        raise UsageError(f"token ids must be integers in 0 .. 2**31 - 1 ({error})") from None
    import numpy as np

    if values and np.frombuffer(values, dtype=np.int32).min() < 0:
        raise UsageError("token ids must lie in 0 .. 2**31 - 1")
    if sys.byteorder == "big":
        values.byteswap()
    return memoryview(values).cast("B")


@dataclass(frozen=True, slots=True, order=True)
class ChunkKey:
    """Names one stored object: whose KV it is, which tensor-parallel shard, which prefix.

    Attributes:
        source: `SourceId` of the model that computed the chunk.
        shard: tensor-parallel shard, `"<rank>of<size>"`.
        prefix: hex link of the prefix hash chain.
    """

    source: SourceId
    shard: str
    prefix: str

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(f"{self.source}/{self.shard}/{self.prefix}"):
            raise UsageError(f"not a chunk key: {self.source}/{self.shard}/{self.prefix}")

    def __hash__(self) -> int:
        # Keys are looked up many times per request; a text remembers its hash, a tuple of texts does not.
        return hash(self.prefix)

    def __str__(self) -> str:
        return f"{self.source}/{self.shard}/{self.prefix}"

    @classmethod
    def parse(cls, text: str) -> ChunkKey:
        """The key that `str(key)` wrote. Raises `UsageError` for anything else."""
        parts = text.split("/")
        if len(parts) != 3:
            raise UsageError(f"not a chunk key: {text!r}; allowed is SOURCE/SHARD/PREFIX")
        return cls(SourceId(parts[0]), parts[1], parts[2])
