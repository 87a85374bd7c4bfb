"""Accepts `lm://` connections of one tenant and gives each a thread.

A connection that waits costs a thread that sleeps, some 20 KiB; one that is served never waits for another
one's socket. There are at most `max_connections` over all listeners.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable

from droidspeak.config import Address
from droidspeak.errors import ConfigError
from droidspeak.integrations.server.channel import Channel
from droidspeak.logs import limited
from droidspeak.storage import Counters

__all__ = ["Crowd", "Listener", "listening"]

_log = limited(logging.getLogger(__name__))
_BACKLOG = 1024


class Crowd:
    """The connections of all listeners together, and the threads that serve them."""

    def __init__(self, limit: int, counters: Counters) -> None:
        self._limit, self._counters = limit, counters
        self._changed = threading.Condition()
        self._open: set[Channel] = set()

    @property
    def size(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    def admit(self, channel: Channel, serve: Callable[[Channel], None]) -> None:
        """Serves `channel` in a thread of its own, and closes it after that; at once where all is taken."""
        with self._changed:
            full = len(self._open) >= self._limit
            if not full:
                self._open.add(channel)
        if full:
            self._counters.add("closed", "too_many")
            channel.close()
            return
        self._counters.add("connections")
        thread = threading.Thread(target=self._run, args=(channel, serve), name="droidspeak-lm", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _log.warning("connection refused: %s", error)
            self._counters.add("closed", "no_thread")
            self._leave(channel)

    def _run(self, channel: Channel, serve: Callable[[Channel], None]) -> None:
        try:
            serve(channel)
        finally:
            self._leave(channel)

    def _leave(self, channel: Channel) -> None:
        channel.close()
        with self._changed:
            self._open.remove(channel)
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until no connection is open; whether that came within `timeout` s."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def drain(self) -> None:
        """Lets every connection end the request it serves, and wait for no other."""
        with self._changed:
            for channel in self._open:
                channel.drain()

    def break_off(self) -> None:
        """Ends what is still open, in the middle of whatever it does."""
        with self._changed:
            for channel in self._open:
                channel.break_off()


class Listener:
    """A listening socket.

    Args:
        address: port 0 takes a free one.
        serve: serves a channel until it ends.
        crowd: of the daemon.
        drain: a descriptor that becomes readable when the daemon stops.
        open_channel: of an accepted connection.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(
        self,
        address: Address,
        serve: Callable[[Channel], None],
        crowd: Crowd,
        drain: int,
        open_channel: Callable[[socket.socket], Channel],
    ) -> None:
        self._serve, self._crowd, self._drain, self._open_channel = serve, crowd, drain, open_channel
        self._socket = listening(address)
        self.address = Address(host=address.host, port=self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name=f"droidspeak-accept-{self.address.port}")
        self._thread.daemon = True

    def start(self) -> None:
        """Begins to accept."""
        self._thread.start()

    def close(self) -> None:
        """Accepts no more; `drain` must be readable. Open connections go on."""
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._drain, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if self._drain in ready:
                return
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                # Out of descriptors, or the client left: later ones may do better.
                _log.warning("cannot accept on %s: %s", self.address, error)
                select.select([self._drain], [], [], 0.1)
                continue
            self._crowd.admit(self._open_channel(connection), self._serve)


def listening(address: Address) -> socket.socket:
    """A socket that listens on `address` and does not block. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"cannot listen on {address}: {reason}") from None
    return listening
