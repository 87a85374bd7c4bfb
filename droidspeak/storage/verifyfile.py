"""One chunk file, looked at from its first byte to its last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from droidspeak.errors import ChunkCorrupt
from droidspeak.storage.chunkfile import read_header
from droidspeak.storage.chunkfolder import opened
from droidspeak.storage.container import ChunkHeader, SlotRecord
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.verify import FindingKind

__all__ = ["Examiner", "FileState", "identity_of"]

# Read in pieces that are still in a cache of the processor when they are checked.
_PIECE = 1 << 20
_HEADER_GUESS = 16 << 10

Identity = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file was found to be.

    Attributes:
        identity: inode, time of the last change in ns, size in bytes: another file has another one.
        header: `None` if it cannot be read.
        fault, detail: what is wrong; `None` and empty if nothing is.
        full: whether the payload was read too.
        read: bytes that were read.
    """

    identity: Identity
    header: ChunkHeader | None
    fault: FindingKind | None
    detail: str
    full: bool
    read: int


class Examiner:
    """Looks at files, from any thread; each thread has one buffer, which it uses again."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def examine(self, path: Path, key: ChunkKey, full: bool) -> FileState | None:
        """What the file of `key` is; `None` if there is none.

        Args:
            full: read the payload too.
        """
        try:
            with opened(path) as file:
                return self._examine(file, key, full)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or str(error)
            identity = identity_of(path)
            return identity and FileState(identity, None, FindingKind.UNREADABLE, reason, full, 0)

    def _examine(self, file: int, key: ChunkKey, full: bool) -> FileState:
        identity = _identity(os.fstat(file))
        header, read = None, 0
        try:
            header = read_header(file, key, _HEADER_GUESS)
            read = header.data_start
            if full:
                read = header.nbytes
                self._check_payload(file, header)
        except ChunkCorrupt as error:
            return FileState(identity, header, FindingKind(error.kind), str(error), full, read)
        return FileState(identity, header, None, "", full, read)

    def _check_payload(self, file: int, header: ChunkHeader) -> None:
        # Two files are read by turns; the system reads further ahead in each if it is told.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        pieces = self._pieces(file, header)
        piece = memoryview(b"")
        for record in header.records.values():
            state, left = xxhash.xxh3_64(), record.nbytes
            while left:
                piece = piece or next(pieces)
                part, piece = piece[:left], piece[left:]
                state.update(part)
                left -= len(part)
            _compare(header, record, state.intdigest())

    def _pieces(self, file: int, header: ChunkHeader) -> Iterator[memoryview]:
        """The payload, piece by piece; the next one takes the place of the last."""
        buffer = self._buffer()
        position, end = header.data_start, header.nbytes
        while position < end:
            done = os.preadv(file, [buffer[: end - position]], position)
            if not done:
                raise ChunkCorrupt(f"chunk {header.key}: the file ends at byte {position}", "truncated")
            yield buffer[:done]
            position += done

    def _buffer(self) -> memoryview:
        held: memoryview | None = getattr(self._of_thread, "buffer", None)
        if held is None:
            held = self._of_thread.buffer = memoryview(bytearray(_PIECE))
        return held


def _compare(header: ChunkHeader, record: SlotRecord, found: int) -> None:
    if found != record.checksum:
        raise ChunkCorrupt(f"chunk {header.key}: {record.slot.name} differs from its checksum")


def identity_of(path: Path) -> Identity | None:
    """Of the file at `path` now; `None` if there is none."""
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result) -> Identity:
    return status.st_ino, status.st_mtime_ns, status.st_size
