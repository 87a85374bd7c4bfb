"""Lookups over many chunks: listing, leading runs, LMCache names."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

from droidspeak.errors import StorageError
from droidspeak.integrations.server.http.auth import Access, Needs
from droidspeak.integrations.server.http.refusals import Reason, Refusal, documented
from droidspeak.integrations.server.http.schemas import DIGEST, ChunkAnswer, LeadingAnswer, LeadingRequest
from droidspeak.integrations.server.objects import key_of
from droidspeak.logs import limited
from droidspeak.storage import ChunkKey, TieredStore

__all__ = ["router"]

_log = limited(logging.getLogger(__name__))
_AT_ONCE = 256
_NDJSON = "application/x-ndjson"
_PARAMETERS = {"source", "limit", "detail", "copies", "tenant"}

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
    request: Request,
    access: Reading,
    source: Annotated[
        str | None, Query(pattern=f"^{DIGEST}$", description="Only of this source model.")
    ] = None,
    limit: Annotated[int | None, Query(ge=1, le=2**31, description="At most so many.")] = None,
    detail: Annotated[bool, Query(description="More than the key.")] = True,
    copies: Annotated[
        bool,
        Query(description="A line for each tier that holds a chunk, not one for the chunk; with all detail."),
    ] = False,
) -> LinesResponse:
    """All chunks, as a stream."""
    if unknown := sorted(request.query_params.keys() - _PARAMETERS):
        # One that is misspelt would list everything.
        raise Refusal(
            422, Reason.BAD_REQUEST, f"query.{unknown[0]}: allowed: {', '.join(sorted(_PARAMETERS))}"
        )
    records = _records(access.store, copies=copies) if detail or copies else _keys(access.store)
    found = (line for chunk, line in records if source in (None, chunk.source))
    lines = _lines(islice(found, limit))
    # What fails at once is answered as an error.
    first = next(lines, b"")
    return LinesResponse(_all(first, lines))


def _all(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _keys(store: TieredStore) -> Iterator[tuple[ChunkKey, Callable[[], str]]]:
    return ((key, partial(json.dumps, {"key": str(key)})) for key in iter(store.keys()))


def _records(store: TieredStore, *, copies: bool) -> Iterator[tuple[ChunkKey, Callable[[], str]]]:
    seen: set[ChunkKey] = set()
    for record in store.records():
        key = record.info.key
        if copies or key not in seen:
            yield key, ChunkAnswer.of_record(record).model_dump_json
        if not copies:
            seen.add(key)


def _lines(found: Iterator[Callable[[], str]]) -> Iterator[bytes]:
    while some := list(islice(found, _AT_ONCE)):
        yield "".join(f"{line()}\n" for line in some).encode()


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
