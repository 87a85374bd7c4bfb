"""One `lm://` connection: requests in order, until it ends.

    wait -> header -> PUT:  body -> chunk -> store
                   -> GET:  store -> reply and bytes
                   -> EXIST, HEALTH: reply

A request that cannot be trusted ends the connection. One that is sound but not acceptable is a miss, or
its object is thrown away, and the connection stays in step: LMCache's client never connects twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from droidspeak.config import ServerSettings
from droidspeak.errors import StorageError
from droidspeak.integrations.server.budget import BytesBudget, OverBudget
from droidspeak.integrations.server.buffers import Buffers
from droidspeak.integrations.server.channel import SEGMENT, Channel, Closed
from droidspeak.integrations.server.objects import answer_of, chunk_of, key_of
from droidspeak.integrations.server.wire import HIT, MISS, REQUEST, BadFrame, Command, Request
from droidspeak.storage import ChunkKey, Counters, TieredStore

__all__ = ["Session"]

_log = logging.getLogger(__name__)
_SCRAP = 64 << 10


class Session:
    """Serves `channel` from one tenant's store.

    Args:
        codec: of what is stored.
        counters: see `DaemonState`.
        budget: of payloads under way, shared by all connections.
        buffers: for what is received, shared as well.
    """

    def __init__(
        self,
        channel: Channel,
        tenant: str,
        store: TieredStore,
        *,
        settings: ServerSettings,
        codec: str,
        counters: Counters,
        budget: BytesBudget,
        buffers: Buffers,
    ) -> None:
        self._channel = channel
        self._tenant, self._store = tenant, store
        self._settings, self._codec = settings, codec
        self._counters, self._budget, self._buffers = counters, budget, buffers
        self._header = memoryview(bytearray(REQUEST.size))
        self._held = 0  # bytes of the budget
        self._usual = 0  # bytes of the object that was asked for last; 0 if none was

    def run(self) -> None:
        """Serves until the connection ends, whoever ends it."""
        try:
            self._channel.open(self._settings.header_timeout)
            while True:
                self._serve(self._next())
        except (Closed, BadFrame) as end:
            reason = end.reason
        except TimeoutError:
            reason = "stalled"
        except OSError as error:
            _log.debug("connection broke: %s", error)
            reason = "broken"
        self._counters.add("closed", reason)

    def _next(self) -> Request:
        header = self._header
        received = self._channel.begin(header, idle=self._settings.idle_timeout)
        if received < len(header):
            self._finish(header[received:])
        return Request.parse(header, self._settings.max_object)

    def _finish(self, rest: memoryview) -> None:
        allowed = self._settings.header_timeout
        try:
            filled = self._channel.fill(rest, silence=allowed, deadline=time.monotonic() + allowed)
        except TimeoutError:
            raise Closed("header_timeout") from None
        if filled < len(rest):
            raise Closed("cut_short")

    def _serve(self, request: Request) -> None:
        self._counters.add("requests", request.command.name.lower())
        fault = request.fault
        if fault:
            self._counters.add("refused", fault)
        if request.command is Command.PUT:
            self._discard(request.length) if fault else self._put(request)
        elif request.command is Command.GET and not fault:
            self._get(request.key)
        else:
            self._say(HIT if not fault and self._is_there(request) else MISS)
        if _log.isEnabledFor(logging.DEBUG):
            parts = {"command": request.command.name.lower(), "refused": fault, "bytes": request.length}
            _log.debug("lm %(command)s", parts, extra=parts)

    # PUT

    def _put(self, request: Request) -> None:
        try:
            self._reserve(request.length)
        except OverBudget:
            self._counters.add("refused", "over_budget")
            self._discard(request.length)
            return
        try:
            self._keep(request)
        finally:
            self._release()

    def _keep(self, request: Request) -> None:
        if request.length <= SEGMENT:
            # A body of one segment waits for the acknowledgement of its header.
            self._channel.acknowledge()
        stored = self._buffers.take(request.length)
        self._receive(stored.numpy().data)
        try:
            self._store.write(chunk_of(self._tenant, request, stored, self._codec))
        except StorageError as error:
            self._failed("put", error)

    def _receive(self, target: memoryview) -> None:
        filled = self._channel.fill(target, silence=self._settings.stall_timeout)
        self._counters.add("received_bytes", amount=filled)
        if filled < len(target):
            raise Closed("cut_short")

    def _discard(self, length: int) -> None:
        scrap = memoryview(bytearray(min(length, _SCRAP)))
        while length:
            part = scrap[:length]
            self._receive(part)
            length -= len(part)

    # GET

    def _get(self, name: bytes) -> None:
        key = key_of(self._tenant, name)
        answer: Sequence[bytes | memoryview] = (MISS,)
        try:
            if not self._usual:
                self._usual = self._claim(self._size(key))
            answer = self._find(key, name)
        except OverBudget:
            self._counters.add("refused", "over_budget")
        except StorageError as error:
            self._failed("get", error)
        try:
            self._say(*answer)
        finally:
            self._release()

    def _size(self, key: ChunkKey) -> int:
        info = self._store.head(key)
        return info.nbytes if info else 0

    def _find(self, key: ChunkKey, name: bytes) -> Sequence[bytes | memoryview]:
        """The answer to a GET, within the budget: its bytes are held when this returns.

        To ask for the size first would take a slow tier as long as to read, and the objects of one client
        are mostly of one size: so as much is reserved as the last one had, and what is larger is read again.
        """
        while True:
            self._reserve(self._usual)
            chunk = self._store.read(key)
            if chunk is None:
                return (MISS,)
            self._usual = max(self._claim(chunk.nbytes), 1)
            if self._usual <= self._held:
                return answer_of(chunk, name)
            del chunk
            self._release()

    def _claim(self, nbytes: int) -> int:
        # What is larger than the whole budget, be it by its header, takes all of it.
        return min(nbytes, self._settings.in_flight)

    def _reserve(self, nbytes: int) -> None:
        self._budget.take(nbytes, self._settings.stall_timeout)
        self._held = nbytes

    def _release(self) -> None:
        self._budget.give_back(self._held)
        self._held = 0

    def _say(self, *parts: bytes | memoryview) -> None:
        self._channel.send(parts, silence=self._settings.stall_timeout)
        self._counters.add("sent_bytes", amount=sum(map(len, parts)))

    # EXIST, HEALTH

    def _is_there(self, request: Request) -> bool:
        if request.command is Command.HEALTH:
            return True
        key = key_of(self._tenant, request.key)
        try:
            if self._settings.acknowledge == "durable":
                return self._store.persisted(key, self._settings.stall_timeout)
            return self._store.head(key) is not None
        except StorageError as error:
            self._failed("exist", error)
            return False

    def _failed(self, command: str, error: StorageError) -> None:
        self._counters.add("failed", command)
        _log.debug("%s: %s", command, error)
