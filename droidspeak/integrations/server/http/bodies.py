"""Payloads in and out: within the budget of bytes under way, and without joining copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from droidspeak.integrations.server.budget import OverBudget
from droidspeak.integrations.server.http.refusals import RETRY_AFTER, Reason, Refusal
from droidspeak.integrations.server.state import DaemonState

__all__ = ["BytesResponse", "receive_into", "reserve"]


def reserve(daemon: DaemonState, nbytes: int) -> ExitStack:
    """Holds `nbytes` of the budget until it is closed. Blocks for `stall_timeout` s at most.

    Raises:
        Refusal: they could not be had.
    """
    server = daemon.settings.server
    nbytes = min(nbytes, server.in_flight)  # what is larger than the whole budget is sent alone
    try:
        daemon.budget.take(nbytes, server.stall_timeout)
    except OverBudget as error:
        message = f"too many bytes are under way: {error}"
        raise Refusal(503, Reason.UNAVAILABLE, message, RETRY_AFTER) from None
    lease = ExitStack()
    lease.callback(daemon.budget.give_back, nbytes)
    return lease


async def receive_into(request: Request, length: int) -> torch.Tensor:
    """The body of `length` bytes, flat `uint8`. Raises `Refusal` when the client leaves before its end."""
    stored = torch.empty(length, dtype=torch.uint8)
    target, filled = stored.numpy().data, 0
    try:
        async for part in request.stream():
            target[filled : filled + len(part)] = part
            filled += len(part)
    except ClientDisconnect:
        raise Refusal(400, Reason.BAD_REQUEST, f"the body ended after {filled} of {length} bytes") from None
    return stored


class BytesResponse(Response):
    """Views of memory, sent one after the other; `lease` is closed when the last one has left."""

    def __init__(
        self, parts: Iterable[memoryview], lease: ExitStack, status: int, headers: Mapping[str, str]
    ) -> None:
        super().__init__(status_code=status, media_type="application/octet-stream")
        # The header of an empty body stands there; the right length is among `headers`.
        self.headers.update(headers)
        self._parts, self._lease = parts, lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        with self._lease:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
