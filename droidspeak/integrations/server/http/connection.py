"""One HTTP connection: uvicorn's protocol, with bounds on what a client may make it wait for or hold.

    request line and headers    within `header_timeout`, and 64 KiB
    answer                      the client takes each `STRIDE` of it within `stall_timeout`
    body that nobody reads      goes on within `stall_timeout`, or the connection ends

What exceeds them is broken off; bodies that are read have their own deadline (`gate`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from droidspeak.storage import Counters

__all__ = ["STRIDE", "BoundedProtocol"]

# Bytes that must come or go within `stall_timeout`: who sends one byte now and then holds memory for ever.
STRIDE = 256 << 10
_MOST_HEADER = 64 << 10


class BoundedProtocol(HttpToolsProtocol):
    """Args as of `HttpToolsProtocol`, and:

    Args:
        header_timeout, stall_timeout: seconds.
        counters: `connections`, `ended`, and `closed` by reason.
    """

    def __init__(
        self, *, header_timeout: float, stall_timeout: float, counters: Counters, **options: Any
    ) -> None:
        super().__init__(**options)
        self._header_timeout, self._stall_timeout = header_timeout, stall_timeout
        self._counters = counters
        self._receiving = _Watch(self)
        self._sending = _Watch(self)
        self._in_header, self._in_body = True, False
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._counters.add("connections")
        self._receiving.start(self._header_timeout, "header_timeout")

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiving.stop()
        self._sending.stop()
        self._counters.add("ended")
        super().connection_lost(exc)

    def break_off(self, reason: str) -> None:
        """Ends the connection at once, whatever is still to be sent."""
        self._counters.add("closed", reason)
        self.transport.abort()

    # Receiving

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > _MOST_HEADER and not self.transport.is_closing():
                self._counters.add("closed", "header_too_large")
                self.send_400_response(f"Headers are larger than {_MOST_HEADER} bytes.")
        elif self._is_idle() and self.timeout_keep_alive_task is None:
            # Blank lines between requests: they have stopped uvicorn's own clock, and begin nothing.
            self._receiving.start(self._header_timeout, "header_timeout")

    def _is_idle(self) -> bool:
        return not self._in_body and self.cycle is not None and self.cycle.response_complete

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header, self._in_body, self._header_bytes = True, False, 0
        self._receiving.start(self._header_timeout, "header_timeout")

    def on_headers_complete(self) -> None:
        self._in_header, self._in_body = False, True
        self._receiving.stop()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._watch_unread()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._receiving.stop()
        super().on_message_complete()

    # Sending

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending.start(self._stall_timeout, "stalled")

    def resume_writing(self) -> None:
        self._sending.stop()
        super().resume_writing()

    def _watch_unread(self) -> None:
        if self._in_body and self.cycle.response_complete:
            self._receiving.start(self._stall_timeout, "stalled")


class _Watch:
    """Breaks the connection off unless it is stopped or started again in time."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float, reason: str) -> None:
        self.stop()
        self._timer = self._protocol.loop.call_later(seconds, self._protocol.break_off, reason)

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
