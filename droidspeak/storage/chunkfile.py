"""Chunk files: written in one gathered write, read range by range, each range checked while it is hot.

Also the mark by which processes that share a folder know who of them is still alive.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from droidspeak.errors import ChunkCorrupt
from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotRecord, coalesce, place
from droidspeak.storage.keys import ChunkKey

__all__ = ["HeaderCache", "WriterMark", "locked_folder", "opened", "read_header", "read_slots", "write_file"]

_IOV_MAX = os.sysconf("SC_IOV_MAX")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of `path` for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_file(path: Path, buffers: Sequence[memoryview]) -> None:
    """Writes a new file, and its folder if that is missing. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    try:
        pending = _after(buffers, 0)
        while pending:
            pending = _after(pending, os.writev(descriptor, pending[:_IOV_MAX]))
    finally:
        os.close(descriptor)


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
) -> Chunk:
    """The chunk with exactly `records`, one scattered read per range of up to `best_read` bytes.

    Raises:
        ChunkCorrupt: bytes are missing or differ from their checksum.
    """
    chunk = Chunk(header, place(records, into))
    for group in coalesce(records, best_read):
        buffers = [chunk.payload[record.slot].numpy().data for record in group]
        _read_into(descriptor, buffers, header.data_start + group[0].start, header.key)
        # The bytes are still in the processor's cache: now the checksum costs no memory traffic.
        chunk.verify(record.slot for record in group)
    return chunk


def _read_into(descriptor: int, buffers: list[memoryview], offset: int, key: ChunkKey) -> None:
    pending = _after(buffers, 0)
    while pending:
        done = os.preadv(descriptor, pending[:_IOV_MAX], offset)
        if done == 0:
            raise ChunkCorrupt(f"chunk {key}: the file ends at byte {offset}")
        pending, offset = _after(pending, done), offset + done


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `buffers` when `done` bytes are done; never begins with an empty buffer."""
    for index, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[index + 1 :]]
        done -= buffer.nbytes
    return []


class HeaderCache:
    """Parsed headers of the files read last. A file that was replaced or changed is read again."""

    def __init__(self, size: int) -> None:
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


class WriterMark:
    """A file that a process keeps locked for as long as it has a folder open for writing.

    The kernel drops the lock when the process dies, in whatever way and in whatever container. Marks
    are made and judged inside catalog transactions, so none is seen between its making and its lock.
    """

    def __init__(self, folder: Path) -> None:
        self.writer = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._path = folder / self.writer
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        """Takes the mark away."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    @staticmethod
    def alive(folder: Path, writer: str) -> bool:
        """Whether the process of `writer` still has the folder open."""
        try:
            with opened(folder / writer) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """One process at a time, over all processes."""
    with opened(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
