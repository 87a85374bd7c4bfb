"""A client's socket: exact reads and writes with deadlines.

LMCache's client leaves Nagle's algorithm on and sends a header and its body apart: the body waits for the
acknowledgement of the header, which Linux delays by 40 ms. So every receive asks for quick
acknowledgements again (the kernel forgets), and an answer leaves in one piece.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["Channel", "Closed"]

_QUICK_ACK = getattr(socket, "TCP_QUICKACK", None)


class Closed(Exception):
    """The connection is over; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Channel:
    """One connection.

    Args:
        connection: connected; it is closed by `close`.
        drain: a descriptor that becomes readable when no further request shall be waited for.
        tls: of a TLS connection, which begins with `open`.
    """

    def __init__(self, connection: socket.socket, drain: int, tls: ssl.SSLContext | None = None) -> None:
        self._socket, self._drain, self._tls = connection, drain, tls
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(drain, select.POLLIN)

    def open(self, timeout: float) -> None:
        """Sets the socket's options, and shakes hands within `timeout` s. Raises `Closed`, `OSError`."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            return
        self._socket.settimeout(timeout)
        try:
            self._socket = self._tls.wrap_socket(self._socket, server_side=True)
        except TimeoutError:
            raise Closed("header_timeout") from None
        except (ssl.SSLError, OSError):
            raise Closed("bad_tls") from None

    def wait(self, timeout: float | None) -> bool:
        """Waits for the next request; `False` if the daemon drains and none is there.

        Raises:
            Closed: none came within `timeout` s.
        """
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        ready = self._poll.poll(None if timeout is None else 1000 * timeout)
        if not ready:
            raise Closed("idle")
        return any(descriptor != self._drain for descriptor, _ in ready)

    def fill(self, target: memoryview, *, silence: float, deadline: float | None = None) -> int:
        """Receives until `target` is full; bytes received, fewer when the client ended the stream.

        Args:
            silence: seconds without a byte that are waited.
            deadline: on the monotonic clock, for all of it.

        Raises:
            TimeoutError: one of both is over.
            OSError: the connection broke.
        """
        filled = 0
        while filled < len(target):
            left = silence if deadline is None else min(silence, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            count = self._socket.recv_into(target[filled:] if filled else target)
            if not count:
                break
            filled += count
            if _QUICK_ACK is not None:
                self._socket.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)
        return filled

    def send(self, parts: Sequence[bytes | memoryview], *, silence: float) -> None:
        """Sends all of `parts`. Raises as `fill`."""
        self._socket.settimeout(silence)
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                self._send_rest(memoryview(part))
            return
        left = self._socket.sendmsg(parts)
        for part in parts:
            if left < len(part):
                self._send_rest(memoryview(part)[left:])
            left = max(0, left - len(part))

    def _send_rest(self, rest: memoryview) -> None:
        # Not `sendall`: its timeout is for the whole, and a slow reader of much may take long.
        while rest:
            rest = rest[self._socket.send(rest) :]

    def break_off(self) -> None:
        """Ends the connection in the middle of whatever is done with it; from any thread."""
        with suppress(OSError):  # it was over already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and frees the socket."""
        self.break_off()
        self._socket.close()
