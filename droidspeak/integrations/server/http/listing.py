"""Lookups over many chunks: listing, leading runs, LMCache names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from starlette.types import Send

from droidspeak.errors import StorageError
from droidspeak.integrations.server.http.auth import Access, Needs
from droidspeak.integrations.server.http.refusals import Reason, Refusal, documented
from droidspeak.integrations.server.http.schemas import DIGEST, ChunkAnswer, LeadingAnswer, LeadingRequest
from droidspeak.integrations.server.objects import key_of
from droidspeak.storage import ChunkKey, TieredStore

__all__ = ["router"]

_log = logging.getLogger(__name__)
_AT_ONCE = 256
_NDJSON = "application/x-ndjson"

router = APIRouter(tags=["lookup"])
Reading = Annotated[Access, Depends(Needs("read"))]


class LinesResponse(StreamingResponse):
    """Lines of JSON. A listing that fails on the way is left unfinished, so that the client sees it."""

    media_type = _NDJSON

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except StorageError as error:
            _log.warning("listing broken off: %s", error)


@router.get(
    "/v1/chunks",
    response_class=LinesResponse,
    responses={
        200: {
            "description": "One JSON object a line: a chunk, or its key only. In no order.",
            "content": {_NDJSON: {"schema": {"type": "string"}}},
        },
        **documented(),
    },
)
def list_chunks(
    access: Reading,
    source: Annotated[
        str | None, Query(pattern=f"^{DIGEST}$", description="Only of this source model.")
    ] = None,
    limit: Annotated[int | None, Query(ge=1, le=2**31, description="At most so many.")] = None,
    detail: Annotated[bool, Query(description="More than the key.")] = True,
) -> LinesResponse:
    """All chunks, as a stream."""
    keys = access.store.keys()
    found = (key for key in keys if source in (None, key.source))
    lines = _lines(access.store, islice(found, limit), detail)
    # What fails at once is answered as an error.
    first = next(lines, b"")
    return LinesResponse(_all(first, lines))


def _all(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _lines(store: TieredStore, keys: Iterator[ChunkKey], detail: bool) -> Iterator[bytes]:
    while some := list(islice(keys, _AT_ONCE)):
        yield "".join(_line(store, key, detail) for key in some).encode()


def _line(store: TieredStore, key: ChunkKey, detail: bool) -> str:
    if not detail:
        return json.dumps({"key": str(key)}) + "\n"
    info = store.head(key)
    # It may have left since it was listed.
    return "" if info is None else ChunkAnswer.of(info).model_dump_json() + "\n"


@router.post("/v1/leading", responses=documented())
def leading(access: Reading, asked: LeadingRequest) -> LeadingAnswer:
    """The longest run of the keys, from the first, that is held without a gap."""
    run = access.store.leading([ChunkKey.parse(key) for key in asked.keys])
    return LeadingAnswer(chunks=[ChunkAnswer.of(info) for info in run])


@router.get("/v1/objects", responses=documented())
def find_object(
    access: Reading, name: Annotated[str, Query(max_length=150, description="Exactly as LMCache spells it.")]
) -> ChunkAnswer:
    """The chunk that holds the object of an LMCache name."""
    info = access.store.head(key_of(access.tenant, name.encode()))
    if info is None:
        raise Refusal(404, Reason.NOT_FOUND, f"no object {name!r}")
    return ChunkAnswer.of(info)
