"""Chunk files read range by range, each range checked while it is hot."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from droidspeak.errors import ChunkCorrupt
from droidspeak.storage.chunkfolder import IOV_MAX, opened, rest_of
from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotRecord, coalesce, place
from droidspeak.storage.keys import ChunkKey

__all__ = ["ChunkReader", "HeaderCache", "read_header", "read_slots"]

_WORTH_HELP = 4


def read_header(descriptor: int, key: ChunkKey, guess: int) -> ChunkHeader:
    """The header of `key`, checked against the file's length.

    Args:
        guess: bytes of the header; one request if it is right or too large, two if not.

    Raises:
        ChunkCorrupt: the file is not that chunk.
    """
    data = os.pread(descriptor, guess, 0)
    length = ChunkHeader.length(data)
    if len(data) < length:
        data += os.pread(descriptor, length - len(data), len(data))
    return ChunkHeader.parse(data[:length]).expect(key, os.fstat(descriptor).st_size)


def read_slots(
    descriptor: int,
    header: ChunkHeader,
    records: Sequence[SlotRecord],
    into: Mapping[Slot, torch.Tensor] | None,
    best_read: int,
    helper: Executor,
) -> Chunk:
    """The chunk with exactly `records`, one scattered read per range of up to `best_read` bytes.

    Args:
        helper: takes every other range of a long read, if it has a thread to spare.

    Raises:
        ChunkCorrupt: bytes are missing or differ from their checksum.
    """
    groups = deque(coalesce(records, best_read))
    payload: dict[Slot, torch.Tensor] = {}

    def drain() -> None:
        while group := _next(groups):
            payload.update(_read_group(descriptor, header, group, into))

    helped = _submitted(helper, drain) if len(groups) >= _WORTH_HELP else None
    try:
        drain()
    finally:
        groups.clear()
        # The helper must be done with this memory and this descriptor before anybody else is.
        if helped and not helped.cancel():
            helped.result()
    return Chunk(header, payload)


def _submitted(helper: Executor, work: Callable[[], None]) -> Future[None] | None:
    # A tier that is being closed, or a system out of threads, has no help to give.
    with suppress(RuntimeError):
        return helper.submit(work)
    return None


def _next(groups: deque[list[SlotRecord]]) -> list[SlotRecord] | None:
    try:
        return groups.popleft()
    except IndexError:
        return None


def _read_group(
    descriptor: int,
    header: ChunkHeader,
    group: list[SlotRecord],
    into: Mapping[Slot, torch.Tensor] | None,
) -> dict[Slot, torch.Tensor]:
    placed = place(group, into)
    buffers = [placed[record.slot].numpy().data for record in group]
    _read_into(descriptor, buffers, header.data_start + group[0].start, header.key)
    # The bytes are still in the processor's cache: now the checksum costs no memory traffic.
    for record, buffer in zip(group, buffers, strict=True):
        header.check(record, buffer)
    return placed


def _read_into(descriptor: int, buffers: list[memoryview], offset: int, key: ChunkKey) -> None:
    pending = rest_of(buffers, 0)
    while pending:
        done = os.preadv(descriptor, pending[:IOV_MAX], offset)
        if done == 0:
            raise ChunkCorrupt(f"chunk {key}: the file ends at byte {offset}")
        pending, offset = rest_of(pending, done), offset + done


class HeaderCache:
    """Parsed headers of the files read last. A file that was replaced or changed is read again."""

    def __init__(self, size: int = 512) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._headers: OrderedDict[tuple[ChunkKey, int, int, int], ChunkHeader] = OrderedDict()

    def get(self, descriptor: int, key: ChunkKey, guess: int) -> ChunkHeader:
        """As `read_header`, without a request if the very same file was read before."""
        status = os.fstat(descriptor)
        identity = (key, status.st_ino, status.st_mtime_ns, status.st_size)
        with self._lock:
            if header := self._headers.get(identity):
                self._headers.move_to_end(identity)
                return header
        header = read_header(descriptor, key, guess)
        with self._lock:
            self._headers[identity] = header
            if len(self._headers) > self._size:
                self._headers.popitem(last=False)
        return header


class ChunkReader:
    """Reads the files of one folder: with a memory of headers, and a helper for long reads."""

    def __init__(self, name: str) -> None:
        self._headers = HeaderCache()
        self._helper = ThreadPoolExecutor(1, f"droidspeak-read-{name}")

    def read(
        self,
        path: Path,
        key: ChunkKey,
        header_bytes: int,
        slots: Collection[Slot] | None,
        into: Mapping[Slot, torch.Tensor] | None,
        best_read: int,
    ) -> Chunk:
        """As of a tier, in ranges of up to `best_read` bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with opened(path) as file:
            header = self._headers.get(file, key, header_bytes)
            return read_slots(file, header, header.select(slots), into, best_read, self._helper)

    def close(self) -> None:
        """Lets the helper go when it is done."""
        self._helper.shutdown(wait=False)
