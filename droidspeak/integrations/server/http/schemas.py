"""The JSON of the HTTP side."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from droidspeak.storage import ChunkInfo, ChunkKey, SourceId, TierUsage
from droidspeak.storage.tier import ChunkRecord

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


class SlotBytesAnswer(BaseModel):
    """Stored bytes of a chunk's slots."""

    k: int = Field(ge=0, description="Keys.")
    v: int = Field(ge=0, description="Values.")
    e: int = Field(ge=0, description="Hidden states (E).")


class ChunkAnswer(BaseModel):
    """What is known of a chunk without reading its payload."""

    key: KeyText
    tokens: int = Field(ge=0, description="Tokens of the chunk; 0 for an object of another system.")
    nbytes: int = Field(ge=0, description="Bytes of the whole container, header included.")
    e_layers: list[int] = Field(description="Layers whose E cache is stored.")
    codec: str = Field(description="Codec of the stored slots.")
    tier: str | None = Field(description="Tier that holds it; null while it waits to be written.")
    salt: str = Field(description="Tag of the tenant's salt, empty for none; the salt itself is nowhere.")
    slots: SlotBytesAnswer | None = Field(description="Bytes by kind; null where the tier does not know.")
    created: datetime | None = Field(
        default=None, description="When it was written; this and the next are told by listings only."
    )
    used: datetime | None = Field(default=None, description="When it was used last.")
    hits: int | None = Field(default=None, ge=0, description="Uses that the eviction policy remembers.")
    pinned: bool | None = Field(default=None, description="Whether it is kept from eviction.")

    @classmethod
    def of_record(cls, record: ChunkRecord) -> ChunkAnswer:
        """As a listing tells it."""
        told = {"created": _moment(record.created), "used": _moment(record.used)}
        return cls.of(record.info).model_copy(update={**told, "hits": record.hits, "pinned": record.pinned})

    @classmethod
    def of(cls, info: ChunkInfo) -> ChunkAnswer:
        return cls(
            key=str(info.key),
            tokens=info.tokens,
            nbytes=info.nbytes,
            e_layers=list(info.e_layers),
            codec=info.codec,
            tier=info.tier,
            salt=info.salt,
            slots=None if info.slots is None else SlotBytesAnswer(**info.slots._asdict()),
        )


def _moment(nanoseconds: int | None) -> datetime | None:
    return None if nanoseconds is None else datetime.fromtimestamp(nanoseconds / 1e9, UTC)


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
    pinned: int | None = Field(
        default=None, ge=0, description="Bytes kept from eviction; null where the tier does not know."
    )

    @classmethod
    def of(cls, name: str, usage: TierUsage | None) -> TierAnswer:
        if usage is None:
            return cls(name=name, answers=False, chunks=None, nbytes=None, capacity=None)
        held = {"chunks": usage.chunks, "nbytes": usage.nbytes, "capacity": usage.capacity}
        return cls(name=name, answers=True, pinned=usage.pinned, **held)


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
