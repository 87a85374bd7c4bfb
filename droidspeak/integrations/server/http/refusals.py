"""Answers that are errors: one JSON shape, reasons from a closed list.

{"error": {"reason": "not_found", "message": "one line"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    StorageError,
    TierFull,
    TierTimeout,
    TierUnavailable,
    UsageError,
)
from droidspeak.integrations.server.budget import OverBudget

__all__ = ["ErrorAnswer", "Reason", "Refusal", "documented", "refusal_of"]

RETRY_AFTER = {"Retry-After": "1"}
_LONGEST_MESSAGE = 500


class Reason(StrEnum):
    """Why a request was not answered with what it asked for."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CORRUPT = "corrupt"
    UNKNOWN_TENANT = "unknown_tenant"
    CHANGED = "changed"
    TOO_LARGE = "too_large"
    BAD_RANGE = "bad_range"
    NOT_A_CHUNK = "not_a_chunk"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    FULL = "full"


class Refusal(HTTPException):
    """An error answer on its way out; `message` is one line for people."""

    def __init__(
        self, status: int, reason: Reason, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.reason = reason

    def response(self) -> JSONResponse:
        """The answer itself."""
        # JSON can spell halves of a character, which cannot be sent back.
        told = self.detail.encode(errors="replace").decode()
        message = " ".join(told.split())[:_LONGEST_MESSAGE]
        content = {"error": {"reason": self.reason.value, "message": message}}
        return JSONResponse(content, self.status_code, self.headers)


class ErrorDetail(BaseModel):
    """What went wrong."""

    reason: Reason = Field(description="Of a closed list.")
    message: str = Field(description="One line for people.")


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


_MEANINGS = {
    400: "The request is malformed, or names something that is not there to be named (`bad_request`).",
    401: "No token, or one that is not known (`unauthorized`).",
    403: "The token lacks the scope, or is for another tenant (`forbidden`).",
    404: "Not held (`not_found`), held but damaged (`corrupt`), or no such tenant (`unknown_tenant`).",
    408: "The client sent nothing for longer than `stall_timeout` (`timeout`).",
    411: "A body without `Content-Length` (`bad_request`).",
    412: "The chunk is not the one that `If-Match` names (`changed`).",
    413: "The body is larger than is allowed (`too_large`).",
    416: "The range is malformed, or lies outside the chunk (`bad_range`).",
    422: "A parameter or a body that is not allowed (`bad_request`), or not a chunk (`not_a_chunk`).",
    503: "No tier answers, or too many bytes are under way (`unavailable`); try again.",
    504: "A tier did not answer in time (`timeout`).",
    507: "No tier has room (`full`).",
}
_EVERYWHERE = (400, 401, 403, 404, 408, 411, 413, 422, 503, 504)
# `model` would be described with the media type of the endpoint's own answer.
_SHAPE = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of an endpoint: `statuses`, and those that any endpoint may give."""
    return {
        status: {"description": _MEANINGS[status], "content": _SHAPE}
        for status in sorted({*_EVERYWHERE, *statuses})
    }


def refusal_of(error: Exception) -> Refusal:
    """The answer to an error, whatever it is."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return _of_routing(error)
    if isinstance(error, RequestValidationError):
        return Refusal(422, Reason.BAD_REQUEST, _first_fault(error))
    for kind, status, reason in _OURS:
        if isinstance(error, kind):
            return Refusal(status, reason, str(error), RETRY_AFTER if status == 503 else None)
    # uvicorn ends the connection after a defect; the client shall not use it again.
    told = "an error of the server; its log has more"
    return Refusal(500, Reason.INTERNAL, told, {"Connection": "close"})


# The first that fits. A chunk that has lost a slot between two looks at it has been replaced.
_OURS: tuple[tuple[type[Exception], int, Reason], ...] = (
    (ChunkCorrupt, 404, Reason.CORRUPT),
    (ChunkIncomplete, 404, Reason.NOT_FOUND),
    (TierFull, 507, Reason.FULL),
    (TierTimeout, 504, Reason.TIMEOUT),
    (TierUnavailable, 503, Reason.UNAVAILABLE),
    (StorageError, 503, Reason.UNAVAILABLE),
    (OverBudget, 503, Reason.UNAVAILABLE),
    (UsageError, 400, Reason.BAD_REQUEST),
)


def _of_routing(error: HTTPException) -> Refusal:
    if error.status_code == 404:
        return Refusal(404, Reason.NOT_FOUND, "no such path; see /openapi.json")
    return Refusal(error.status_code, Reason.BAD_REQUEST, error.detail, error.headers)


def _first_fault(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}"


async def answer_refusal(request: Request, error: Exception) -> JSONResponse:
    """The exception handler of the application."""
    refusal = refusal_of(error)
    request.app.state.counters.add("refused", refusal.reason)
    return refusal.response()
