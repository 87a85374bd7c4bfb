"""`Range`, `If-Range` and `If-Match`: which bytes of a chunk are meant, and of which content.

Source: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from droidspeak.integrations.server.http.connection import STRIDE
from droidspeak.integrations.server.http.refusals import Reason, Refusal
from droidspeak.storage import Chunk, ChunkHeader, Slot

__all__ = ["etag_of", "matches", "pieces", "requested", "touched"]

_BYTES = re.compile(r"\s*([0-9]{0,40})\s*-\s*([0-9]{0,40})\s*")


def etag_of(header: ChunkHeader) -> str:
    """A strong validator: the header's digest covers the checksums of all slots."""
    return f'"{header.digest}"'


def matches(condition: str, etag: str) -> bool:
    """Whether an `If-Match` value names `etag`."""
    return any(candidate.strip() in ("*", etag) for candidate in condition.split(","))


def requested(ranges: str, size: int) -> tuple[int, int] | None:
    """`(start, end)` of the one range that a `Range` header names in `size` bytes; `end` is exclusive.

    `None` for a unit other than bytes, which is ignored.

    Raises:
        Refusal: it is malformed, names several ranges, or lies outside.
    """
    unit, _, rest = ranges.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    found = _BYTES.fullmatch(rest)
    start, end = _bounds(found[1], found[2], size) if found else (0, 0)
    if start >= end:
        headers = {"Content-Range": f"bytes */{size}"}
        message = f"range {ranges!r} of a chunk of {size} bytes; allowed is one of a-b, a- or -n"
        raise Refusal(416, Reason.BAD_RANGE, message, headers)
    return start, end


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return max(0, size - int(last or "0")), size


def touched(header: ChunkHeader, start: int, end: int) -> list[Slot]:
    """The slots of which bytes `start`..`end` of the object hold something."""
    begin, stop = start - header.data_start, end - header.data_start
    return [
        slot
        for slot, record in header.records.items()
        if record.nbytes and record.start < stop and record.end > begin
    ]


def pieces(chunk: Chunk, start: int, end: int) -> Iterator[memoryview]:
    """Bytes `start`..`end` of the object, as views of at most `STRIDE`. What is `touched` must be here."""
    header = chunk.header
    yield from _cut(memoryview(header.encoded), start, end)
    for slot in touched(header, start, end):
        origin = header.data_start + header.records[slot].start
        # A tier on another device gives tensors that lie there.
        stored = chunk.payload[slot].cpu().numpy().data
        yield from _cut(stored, start - origin, end - origin)


def _cut(whole: memoryview, start: int, end: int) -> Iterator[memoryview]:
    end = min(end, len(whole))
    for position in range(max(start, 0), end, STRIDE):
        yield whole[position : min(position + STRIDE, end)]
