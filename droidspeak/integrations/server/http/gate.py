"""The gate in front of the endpoints: who is it, how much may come in and when, and what is counted.

It stands before anything of a body is read, so that nobody without a token makes the daemon hold bytes.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from droidspeak.integrations.server.http.auth import Doorkeeper
from droidspeak.integrations.server.http.connection import STRIDE
from droidspeak.integrations.server.http.refusals import Reason, Refusal
from droidspeak.storage import Counters

__all__ = ["Gate"]

_log = logging.getLogger(__name__)
# Of a body that is JSON: the longest list of keys that is allowed, and room.
_MOST_JSON = 1 << 20
_OPEN_TO_ALL = frozenset({"/healthz", "/readyz"})


class Gate:
    """ASGI middleware.

    Args:
        stall_timeout: seconds that a client may take for the next `STRIDE` of a body.
        counters: of the HTTP side; see `DaemonCollector`.
    """

    def __init__(
        self, app: ASGIApp, doorkeeper: Doorkeeper, stall_timeout: float, counters: Counters
    ) -> None:
        self._app, self._doorkeeper = app, doorkeeper
        self._stall_timeout, self._counters = stall_timeout, counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                self._counters.add("sent_bytes", amount=len(message.get("body", b"")))
            await send(message)

        try:
            await self._pass(scope, receive, told)
        finally:
            operation = getattr(scope.get("route"), "name", "none")
            self._counters.add("requests", f"{operation} {status}")
            parts = {"operation": operation, "code": status, "method": scope["method"], "path": scope["path"]}
            _log.debug("%s %r %d", scope["method"], scope["path"], status, extra=parts)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except Refusal as refusal:
            self._counters.add("refused", refusal.reason)
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, self._in_time(receive), send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in _OPEN_TO_ALL:
            caller = self._doorkeeper.admit(
                headers.get(b"authorization"), headers.get(b"host"), page=_is_page(scope)
            )
            scope.setdefault("state", {})["caller"] = caller
        if b"transfer-encoding" in headers:
            # What comes after is not waited for.
            raise Refusal(411, Reason.BAD_REQUEST, "a body needs Content-Length", {"Connection": "close"})
        if not _is_chunk(scope) and int(headers.get(b"content-length", b"0")) > _MOST_JSON:
            message = f"a body of {int(headers[b'content-length'])} bytes; allowed are {_MOST_JSON}"
            raise Refusal(413, Reason.TOO_LARGE, message, {"Connection": "close"})

    def _in_time(self, receive: Receive) -> Receive:
        clock = asyncio.get_running_loop().time
        more, progress, deadline = True, 0, 0.0

        async def bounded() -> Message:
            nonlocal more, progress, deadline
            if not more:  # what comes now is the end of the connection
                return await receive()
            if not progress:
                deadline = clock() + self._stall_timeout
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise self._stalled() from None
            more, received = message.get("more_body", False), len(message.get("body", b""))
            progress = progress + received if progress + received < STRIDE else 0
            self._counters.add("received_bytes", amount=received)
            return message

        return bounded

    def _stalled(self) -> Refusal:
        told = f"less than {STRIDE} bytes in {self._stall_timeout:g} s"
        return Refusal(408, Reason.TIMEOUT, told, {"Connection": "close"})


def _is_chunk(scope: Scope) -> bool:
    """Whether a container comes, which is bounded where it is received."""
    return scope["method"] == "PUT" and str(scope["path"]).startswith("/v1/chunks/")


def _is_page(scope: Scope) -> bool:
    return scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
