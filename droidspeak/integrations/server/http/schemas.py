"""The JSON of the HTTP side."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from droidspeak.storage import ChunkInfo, ChunkKey, SourceId, TierUsage

__all__ = [
    "ChunkAnswer",
    "EvictAnswer",
    "EvictRequest",
    "HealthAnswer",
    "LeadingAnswer",
    "LeadingRequest",
    "TierAnswer",
    "UsageAnswer",
    "VerifyAnswer",
    "key_of_path",
]

DIGEST = "[0-9a-f]{64}"
SHARD = "[0-9]{1,4}of[0-9]{1,4}"
MOST_KEYS = 4096
_MOST_BYTES = 2**63 - 1

KeyText = Annotated[
    str, Field(pattern=f"^{DIGEST}/{SHARD}/{DIGEST}$", examples=[f"{'a' * 64}/0of1/{'b' * 64}"])
]


def key_of_path(
    source: Annotated[str, Path(pattern=f"^{DIGEST}$", description="Digest of the source model.")],
    shard: Annotated[str, Path(pattern=f"^{SHARD}$", description="Tensor-parallel shard, `RANKofSIZE`.")],
    prefix: Annotated[str, Path(pattern=f"^{DIGEST}$", description="Link of the prefix hash chain.")],
) -> ChunkKey:
    """The key that a path names."""
    return ChunkKey(SourceId(source), shard, prefix)


class _Request(BaseModel):
    # What is not understood is refused: a misspelt key would be ignored.
    model_config = ConfigDict(extra="forbid", strict=True)


class LeadingRequest(_Request):
    """Chunks of one prefix, in order."""

    keys: list[KeyText] = Field(max_length=MOST_KEYS)


class EvictRequest(_Request):
    """How many bytes shall leave which tier."""

    tier: str = Field(description="Name of a tier; `/v1/usage` has them.", max_length=200)
    nbytes: int = Field(ge=1, le=_MOST_BYTES, description="Bytes to free.")


class ChunkAnswer(BaseModel):
    """What is known of a chunk without reading its payload."""

    key: KeyText
    tokens: int = Field(ge=0, description="Tokens of the chunk; 0 for an object of another system.")
    nbytes: int = Field(ge=0, description="Bytes of the whole container, header included.")
    e_layers: list[int] = Field(description="Layers whose E cache is stored.")
    codec: str = Field(description="Codec of the stored slots.")
    tier: str | None = Field(description="Tier that holds it; null while it waits to be written.")

    @classmethod
    def of(cls, info: ChunkInfo) -> ChunkAnswer:
        return cls(
            key=str(info.key),
            tokens=info.tokens,
            nbytes=info.nbytes,
            e_layers=list(info.e_layers),
            codec=info.codec,
            tier=info.tier,
        )


class LeadingAnswer(BaseModel):
    """The longest run of the keys, from the first, that is held without a gap."""

    chunks: list[ChunkAnswer]


class TierAnswer(BaseModel):
    """One tier; fast ones come first."""

    name: str
    answers: bool = Field(description="Whether the tier could be asked; if not, the numbers are null.")
    chunks: int | None = Field(ge=0)
    nbytes: int | None = Field(ge=0, description="Bytes held.")
    capacity: int | None = Field(ge=0, description="Bytes; null where the tier sets no bound.")

    @classmethod
    def of(cls, name: str, usage: TierUsage | None) -> TierAnswer:
        if usage is None:
            return cls(name=name, answers=False, chunks=None, nbytes=None, capacity=None)
        return cls(name=name, answers=True, chunks=usage.chunks, nbytes=usage.nbytes, capacity=usage.capacity)


class UsageAnswer(BaseModel):
    """What a tenant's store holds, and what has happened in it."""

    tenant: str = Field(description="Empty for the default tenant.")
    tiers: list[TierAnswer]
    counters: dict[str, dict[str, int]] = Field(
        description="Event, then tier (empty where it is of no tier), then how often."
    )


class VerifyAnswer(BaseModel):
    """Whether every tier's copy matches its checksums."""

    ok: bool
    found: str | None = Field(default=None, description="What is wrong, one line.")


class EvictAnswer(BaseModel):
    """What an eviction did."""

    freed: int = Field(ge=0, description="Bytes; fewer than asked for when all that is left is pinned.")


class HealthAnswer(BaseModel):
    """Health."""

    status: str
