"""A client's socket: exact reads and writes with deadlines.

LMCache's client leaves Nagle's algorithm on and sends a header and its body apart: the end of a body waits
for the acknowledgement of what came before, which Linux delays by 40 ms. So a body's parts are acknowledged
at once (the kernel forgets that it was asked to), its last segment is received on its own, and an answer
leaves in one piece.

Timeouts are the kernel's (`SO_RCVTIMEO`): Python's own cost two more system calls for each receive.
"""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import termios
import threading
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["SEGMENT", "Channel", "Closed"]

_QUICK_ACK = getattr(socket, "TCP_QUICKACK", None)
SEGMENT = 64 << 10  # of the loopback device, the largest there is
_LARGEST_RECEIVE = 4 << 20


class Closed(Exception):
    """The connection is over; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Channel:
    """One connection.

    Args:
        connection: connected; it is closed by `close`.
        tick: seconds after which a receive or a send looks at the clock; the shortest of the timeouts.
        tls: of a TLS connection, which begins with `open`.
    """

    def __init__(self, connection: socket.socket, *, tick: float, tls: ssl.SSLContext | None = None) -> None:
        self._socket, self._tick, self._tls = connection, tick, tls
        self._gate = threading.Lock()
        self._waiting = self._drained = False

    def open(self, timeout: float) -> None:
        """Sets the socket's options, and shakes hands within `timeout` s. Raises `Closed`, `OSError`."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            span = struct.pack("ll", int(self._tick), int(self._tick % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)
            return
        self._socket.settimeout(timeout)
        try:
            self._socket = self._tls.wrap_socket(self._socket, server_side=True)
        except TimeoutError:
            raise Closed("header_timeout") from None
        except (ssl.SSLError, OSError):
            raise Closed("bad_tls") from None
        self._socket.settimeout(self._tick)

    def begin(self, target: memoryview, *, idle: float | None) -> int:
        """Waits for the next request and receives what is there of it into `target`; bytes received.

        Raises:
            Closed: `idle` s went by, the client has ended the stream, or the daemon drains.
            OSError: the connection broke.
        """
        with self._gate:
            if self._drained and not self._arrived():
                raise Closed("drained")
            self._waiting = True
        waited = 0.0
        while (count := self._receive(target)) < 0:
            waited += self._tick
            if idle is not None and waited >= idle:
                raise Closed("idle")
        self._waiting = False
        if not count:
            raise Closed("drained" if self._drained else "by_client")
        return count

    def drain(self) -> None:
        """Lets the requests end that have arrived, and waits for no other; from any thread."""
        with self._gate:
            self._drained = True
            if self._waiting and not self._arrived():
                with suppress(OSError):  # it was over already
                    self._socket.shutdown(socket.SHUT_RD)

    def _arrived(self) -> bool:
        """Whether bytes are there that nobody has received: PUTs, say, that have no other acknowledgement."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        arrived = array("i", [0])
        with suppress(OSError):  # it was over already
            fcntl.ioctl(self._socket, termios.FIONREAD, arrived)
        return bool(arrived[0])

    def fill(self, target: memoryview, *, silence: float, deadline: float | None = None) -> int:
        """Receives until `target` is full; bytes received, fewer when the client ended the stream.

        Args:
            silence: seconds without a byte that are waited.
            deadline: on the monotonic clock, for all of it.

        Raises:
            TimeoutError: one of both is over.
            OSError: the connection broke.
        """
        filled, waited = 0, 0.0
        while filled < len(target):
            count = self._receive(target[filled:] if filled else target)
            if not count:
                break
            # A receive that gave up counts as one of no bytes.
            waited = waited + self._tick if count < 0 else 0.0
            filled += max(count, 0)
            late = deadline is not None and filled < len(target) and time.monotonic() > deadline
            if waited >= silence or late:
                raise TimeoutError
            self.acknowledge()
        return filled

    def acknowledge(self) -> None:
        """Sends the acknowledgement of what has been received now."""
        if _QUICK_ACK is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)

    def _receive(self, target: memoryview) -> int:
        """Bytes received, 0 at the end of the stream, -1 if none came within a tick."""
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                return self._socket.recv_into(target)
            whole = min(len(target) - SEGMENT, _LARGEST_RECEIVE)
            return self._socket.recv_into(target, max(whole, 0), socket.MSG_WAITALL if whole > 0 else 0)
        except (TimeoutError, BlockingIOError):
            return -1

    def send(self, parts: Sequence[bytes | memoryview], *, silence: float) -> None:
        """Sends all of `parts`. Raises as `fill`."""
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                self._send_rest(memoryview(part), silence)
            return
        try:
            sent = self._socket.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        for part in parts:
            if sent < len(part):
                self._send_rest(memoryview(part)[sent:], silence)
            sent = max(0, sent - len(part))

    def _send_rest(self, rest: memoryview, silence: float) -> None:
        waited = 0.0
        while rest:
            try:
                # Not `sendall`: its timeout is for the whole, and a slow reader of much may take long.
                rest = rest[self._socket.send(rest) :]
                waited = 0.0
            except (TimeoutError, BlockingIOError):
                waited += self._tick
                if waited >= silence:
                    raise TimeoutError from None

    def break_off(self) -> None:
        """Ends the connection in the middle of whatever is done with it; from any thread."""
        with suppress(OSError):  # it was over already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and frees the socket."""
        self.break_off()
        self._socket.close()
