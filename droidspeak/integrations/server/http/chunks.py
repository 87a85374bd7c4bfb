"""One chunk: `/v1/chunks/{source}/{shard}/{prefix}`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, Request, Response
from fastapi import Header as HttpHeader
from starlette.concurrency import run_in_threadpool

from droidspeak.errors import ChunkCorrupt, ChunkIncomplete
from droidspeak.integrations.server.http.auth import Access, Needs
from droidspeak.integrations.server.http.bodies import BytesResponse, receive_into, reserve
from droidspeak.integrations.server.http.ranges import etag_of, matches, pieces, requested, touched
from droidspeak.integrations.server.http.refusals import RETRY_AFTER, Reason, Refusal, documented
from droidspeak.integrations.server.http.schemas import VerifyAnswer, key_of_path
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import Chunk, ChunkHeader, ChunkKey, Tier, TieredStore
from droidspeak.storage.container import MAX_HEADER_BYTES

__all__ = ["router"]

PATH = "/v1/chunks/{source}/{shard}/{prefix}"
# A chunk may be replaced between two looks at it; one that is replaced all the time is not waited for.
_LOOKS = 3

router = APIRouter(tags=["chunks"])
Key = Annotated[ChunkKey, Depends(key_of_path)]
Reading = Annotated[Access, Depends(Needs("read"))]
Writing = Annotated[Access, Depends(Needs("write"))]
IfMatch = Annotated[str | None, HttpHeader(description="Entity tags; another one answers 412.")]

_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_CHUNK_HEADERS = {
    "ETag": {"schema": _TEXT, "description": "Digest of the container's header; strong."},
    "Accept-Ranges": {"schema": _TEXT, "description": "`bytes`."},
    "X-Droidspeak-Header-Bytes": {"schema": _COUNT, "description": "Bytes before the first slot."},
    "X-Droidspeak-Tokens": {"schema": _COUNT, "description": "Tokens of the chunk."},
    "X-Droidspeak-E-Layers": {"schema": _TEXT, "description": "Layers whose E is stored, comma list."},
    "X-Droidspeak-Codec": {"schema": _TEXT, "description": "Codec of the stored slots."},
}
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_WHOLE = {"description": "The whole container.", "headers": _CHUNK_HEADERS, "content": _BINARY}
_PART = {
    "description": "The bytes of the range.",
    "headers": {**_CHUNK_HEADERS, "Content-Range": {"schema": _TEXT, "description": "`bytes a-b/size`."}},
    "content": _BINARY,
}
_BODY = {"requestBody": {"required": True, "description": "A whole container.", "content": _BINARY}}
_DONE: dict[str, Any] = {"status_code": 204, "response_class": Response}


@router.head(
    PATH,
    response_class=Response,
    responses={200: {"description": "It is held.", "headers": _CHUNK_HEADERS}, **documented(412)},
)
def head_chunk(key: Key, access: Reading, if_match: IfMatch = None) -> Response:
    """What a GET would say, without the bytes."""
    header = _header(access.store, key)
    _check_etag(header, if_match)
    return Response(
        headers={**_described(header), "Content-Length": str(header.nbytes)},
        media_type="application/octet-stream",
    )


@router.get(PATH, response_class=Response, responses={200: _WHOLE, 206: _PART, **documented(412, 416)})
def get_chunk(
    request: Request,
    key: Key,
    access: Reading,
    range_: Annotated[
        str | None, HttpHeader(alias="Range", description="One range of bytes: `bytes=a-b`, `a-` or `-n`.")
    ] = None,
    if_range: Annotated[str | None, HttpHeader(description="Ignore `Range` if this is not the ETag.")] = None,
    if_match: IfMatch = None,
) -> Response:
    """The container's bytes. Of a range, only the slots that it touches are read."""
    header = _header(access.store, key)
    for _look in range(_LOOKS):
        _check_etag(header, if_match)
        wanted = None
        if range_ is not None and if_range in (None, etag_of(header)):
            wanted = requested(range_, header.nbytes)
        start, end = wanted or (0, header.nbytes)
        slots = touched(header, start, end)
        with ExitStack() as undo:
            nbytes = sum(header.records[slot].nbytes for slot in slots)
            lease = undo.enter_context(reserve(request.app.state.daemon, nbytes))
            chunk = _slots(access.store, key, header, None if wanted is None else slots)
            if isinstance(chunk, Chunk):
                undo.pop_all()
                return _answer(chunk, start, end, lease, partial=wanted is not None)
        header = chunk
    raise Refusal(503, Reason.UNAVAILABLE, f"chunk {key} is replaced while it is read", RETRY_AFTER)


def _header(store: TieredStore, key: ChunkKey) -> ChunkHeader:
    # No slot is asked for: a tier reads, or remembers, the header only.
    chunk = store.read(key, ())
    if chunk is None:
        raise _missing(key)
    return chunk.header


def _slots(
    store: TieredStore, key: ChunkKey, header: ChunkHeader, slots: list[Any] | None
) -> Chunk | ChunkHeader:
    """The chunk with `slots`, if it still is the one of `header`; else the header that it has now."""
    try:
        chunk = store.read(key, slots)
    except ChunkIncomplete:
        return _header(store, key)
    if chunk is None:
        raise _missing(key)
    return chunk if chunk.header.digest == header.digest else chunk.header


def _answer(chunk: Chunk, start: int, end: int, lease: ExitStack, *, partial: bool) -> Response:
    headers = {**_described(chunk.header), "Content-Length": str(end - start)}
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{chunk.header.nbytes}"
    return BytesResponse(pieces(chunk, start, end), lease, 206 if partial else 200, headers)


def _described(header: ChunkHeader) -> dict[str, str]:
    return {
        "ETag": etag_of(header),
        "Accept-Ranges": "bytes",
        "X-Droidspeak-Header-Bytes": str(header.data_start),
        "X-Droidspeak-Tokens": str(header.tokens),
        "X-Droidspeak-E-Layers": ",".join(map(str, header.e_layers)),
        "X-Droidspeak-Codec": header.codec,
    }


def _check_etag(header: ChunkHeader, condition: str | None) -> None:
    if condition is not None and not matches(condition, etag_of(header)):
        raise Refusal(412, Reason.CHANGED, f"the chunk is {etag_of(header)} now", {"ETag": etag_of(header)})


def _missing(key: ChunkKey) -> Refusal:
    return Refusal(404, Reason.NOT_FOUND, f"no chunk {key}")


@router.put(PATH, **_DONE, responses=documented(507), openapi_extra=_BODY)
async def put_chunk(request: Request, key: Key, access: Writing) -> Response:
    """Store a container, checked in full: header, key and every slot. An older one is replaced."""
    daemon: DaemonState = request.app.state.daemon
    length = _declared(request, daemon)
    with await run_in_threadpool(reserve, daemon, length):
        stored = await receive_into(request, length)
        await run_in_threadpool(_store, access.store, key, stored)
    return Response(status_code=204)


def _declared(request: Request, daemon: DaemonState) -> int:
    """`Content-Length`, if such a body may come."""
    declared = request.headers.get("content-length")
    if declared is None:
        raise Refusal(411, Reason.BAD_REQUEST, "a container needs Content-Length")
    length = int(declared)
    server = daemon.settings.server
    most = min(server.max_object + MAX_HEADER_BYTES, server.in_flight)
    if length > most:
        # The rest of the body is not waited for.
        message = f"a body of {length} bytes; allowed are {most}"
        raise Refusal(413, Reason.TOO_LARGE, message, {"Connection": "close"})
    return length


def _store(store: TieredStore, key: ChunkKey, stored: torch.Tensor) -> None:
    try:
        chunk = Chunk.adopt(stored, key)
    except ChunkCorrupt as error:
        raise Refusal(422, Reason.NOT_A_CHUNK, str(error)) from None
    store.write(chunk)


@router.delete(PATH, **_DONE, responses=documented())
def delete_chunk(key: Key, access: Writing) -> Response:
    """Remove a chunk from all tiers, pinned or not."""
    return _done(key, access.store.delete(key))


@router.put(PATH + "/pin", **_DONE, responses=documented())
def pin_chunk(key: Key, access: Writing) -> Response:
    """Keep a chunk from eviction."""
    return _done(key, access.store.pin(key))


@router.delete(PATH + "/pin", **_DONE, responses=documented())
def unpin_chunk(key: Key, access: Writing) -> Response:
    """Allow eviction of a chunk again."""
    return _done(key, access.store.unpin(key))


@router.post(PATH + "/quarantine", **_DONE, responses=documented())
def quarantine_chunk(key: Key, access: Writing) -> Response:
    """Take a damaged chunk out of sight, in all tiers."""
    access.store.quarantine(key)
    return Response(status_code=204)


def _done(key: ChunkKey, there: bool) -> Response:
    if not there:
        raise _missing(key)
    return Response(status_code=204)


@router.post(PATH + "/verify", responses=documented())
def verify_chunk(request: Request, key: Key, access: Reading) -> VerifyAnswer:
    """Read every tier's copy in full and compare its checksums. Nothing is changed."""
    info = access.store.head(key)
    if info is None:
        raise _missing(key)
    daemon: DaemonState = request.app.state.daemon
    # What waits to be written is no copy of a tier yet.
    access.store.persisted(key, daemon.settings.server.stall_timeout)
    with reserve(daemon, info.nbytes):
        found = [fault for tier in access.store.tiers if (fault := _fault(tier, key))]
    return VerifyAnswer(ok=not found, found="; ".join(found) or None)


def _fault(tier: Tier, key: ChunkKey) -> str | None:
    try:
        chunk = tier.read(key)
        if chunk is not None:
            chunk.verify()
    except ChunkCorrupt as error:
        return f"tier {tier.name}: {error}"
    return None
