"""How chunks and figures are shown: raw in JSON, short in tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from droidspeak.integrations.cli.output import Column
from droidspeak.integrations.cli.store.names import short
from droidspeak.storage.tier import ChunkRecord, SlotBytes

__all__ = [
    "age_text",
    "chunk_cells",
    "chunk_columns",
    "chunk_row",
    "iso_time",
    "parse_iso_time",
    "share_text",
    "size_text",
    "slots_row",
]

_PREFIX_DIGITS = 12
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_LIST_WIDTH = 24


def size_text(nbytes: int) -> str:
    """`1.5 GiB`."""
    value, unit = float(nbytes), 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{nbytes} B"


def share_text(part: int, whole: int | None) -> str:
    """`12 %`; `-` of nothing, or of what has no bound."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def iso_time(nanoseconds: int | None) -> str | None:
    """UTC, of ns since the epoch: `2026-01-31T12:00:00.250Z`."""
    if nanoseconds is None:
        return None
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{_second(seconds)}.{rest // 10**6:03d}Z"


@lru_cache(4096)
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def parse_iso_time(told: str) -> int:
    """What `iso_time` wrote, in ns since the epoch."""
    moment = datetime.fromisoformat(told)
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def age_text(nanoseconds: int, now: int) -> str:
    """How long ago: `3d`, `12h`."""
    seconds = max(now - nanoseconds, 0) // 10**9
    size, unit = next((step for step in _AGES if seconds >= step[0]), _AGES[-1])
    return f"{seconds // size}{unit}"


def slots_row(slots: SlotBytes | None) -> dict[str, int] | None:
    """Bytes by kind."""
    return None if slots is None else slots._asdict()


def chunk_row(record: ChunkRecord, names: Mapping[str, str]) -> dict[str, Any]:
    """A chunk as JSON tells it."""
    info = record.info
    return {
        "key": str(info.key),
        "source": info.key.source,
        "model": names.get(info.key.source),
        "shard": info.key.shard,
        "prefix": info.key.prefix,
        "tokens": info.tokens,
        "bytes": info.nbytes,
        "slots": slots_row(info.slots),
        "e_layers": list(info.e_layers),
        "codec": info.codec,
        "salt": info.salt,
        "tier": info.tier,
        "created": iso_time(record.created),
        "used": iso_time(record.used),
        "hits": record.hits,
        "pinned": record.pinned,
    }


def chunk_cells(record: ChunkRecord) -> dict[str, Any]:
    """A chunk as a table takes it, in `chunk_columns`."""
    info = record.info
    return {
        "source": info.key.source,
        "shard": info.key.shard,
        "prefix": info.key.prefix,
        "tokens": info.tokens,
        "bytes": info.nbytes,
        "e_layers": info.e_layers,
        "codec": info.codec,
        "tier": info.tier,
        "created": record.created,
        "used": record.used,
        "hits": record.hits,
        "pinned": record.pinned,
    }


def chunk_columns(names: Mapping[str, str]) -> list[Column]:
    """The columns of a table of chunks, for rows of `chunk_cells`."""
    now = time.time_ns()

    def ago(nanoseconds: int) -> str:
        return age_text(nanoseconds, now)

    return [
        Column("source", "SOURCE", lambda source: short(source, names)),
        Column("shard", "SHARD"),
        Column("prefix", "PREFIX", lambda prefix: str(prefix)[:_PREFIX_DIGITS]),
        Column("tokens", "TOKENS", right=True),
        Column("bytes", "SIZE", size_text, right=True),
        Column("e_layers", "E LAYERS", _layers),
        Column("codec", "CODEC"),
        Column("tier", "TIER"),
        Column("created", "CREATED", ago, right=True),
        Column("used", "USED", ago, right=True),
        Column("hits", "HITS", right=True),
        Column("pinned", "PINNED", lambda pinned: "yes" if pinned else "no"),
    ]


@lru_cache
def _layers(layers: tuple[int, ...]) -> str:
    text = ",".join(map(str, layers))
    if len(text) > _LIST_WIDTH:
        text = f"{len(layers)} layers"
    return text or "none"
