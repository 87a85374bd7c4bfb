"""The archive of an export while it is not whole: `FILE.partial`, with which the next export to FILE goes on.

    lock       one export at a time
    look       the members from the first on, as far as their tar headers are what an export writes
    keep       those that are wanted still: the same chunk as in the store now, by its header, and every byte
               as its checksums say
    drop       all others: what is behind moves up
    go on      `export_chunks` writes what is missing behind them
    rename     the archive is whole

Nothing is remembered beside the file, and nothing in it is trusted. Whatever is broken off here, too, leaves
a file that can be gone on with.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tarfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from droidspeak.errors import ChunkCorrupt, DroidSpeakError, UsageError
from droidspeak.storage.archive import key_of, member_of
from droidspeak.storage.chunklist import ChunkList, Row
from droidspeak.storage.container import Chunk
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.spread import spread
from droidspeak.storage.transfer import Copied, Fate

__all__ = ["keep_chunks", "partial_file", "partial_path"]

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_READERS = 2


def partial_path(path: Path) -> Path:
    """Where an archive is until it can be called `path`."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def partial_file(path: Path) -> Iterator[IO[bytes]]:
    """`partial_path(path)` as it is, to read and to write. It is renamed to `path` at the end; after an error
    it stays, unless it is empty.

    Raises:
        OSError: it cannot be opened, written or renamed.
        DroidSpeakError: another export writes it.
    """
    partial = partial_path(path)
    file = _locked(partial)
    try:
        yield file
        file.flush()
        partial.replace(path)
    finally:
        # After a full disk the buffer cannot be written here either.
        with suppress(OSError):
            file.flush()
        if not os.fstat(file.fileno()).st_size:
            partial.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def _opener(path: str, _flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _locked(partial: Path) -> IO[bytes]:
    while True:
        with ExitStack() as undo:
            file = undo.enter_context(open(partial, "r+b", opener=_opener))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DroidSpeakError(f"{partial}: another export is writing it") from None
            # Whoever had the lock may have renamed the file meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(partial.stat(), os.fstat(file.fileno())):
                    undo.pop_all()
                    return file


@dataclass(frozen=True, slots=True)
class _Member:
    """A member: where its tar header begins, and the row of its chunk in the list; `None` if it has none."""

    offset: int
    key: ChunkKey
    nbytes: int
    row: Row | None

    @property
    def end(self) -> int:
        return self.offset + _BLOCK + -(-self.nbytes // _BLOCK) * _BLOCK


def keep_chunks(file: IO[bytes], wanted: ChunkList) -> Generator[Copied, None, None]:
    """Keeps the members of `file` whose chunks are in `wanted`, and the same there; tells of each as `held`.

    Their keys leave `wanted`. The file ends behind the last of them, and stands there.

    Raises:
        UsageError: the file begins like no export's. Nothing of it was changed.
        OSError: the file cannot be read or written.
        TierUnavailable, TierTimeout: a tier does not answer.
    """
    descriptor, end = file.fileno(), 0
    members = _members(descriptor, file.name, wanted)
    for member, same in spread(lambda one: (one, _same(descriptor, one)), members, _READERS):
        if same and wanted.discard(member.key):
            _move(descriptor, member.offset, end, member.end - member.offset)
            end += member.end - member.offset
            yield Copied(member.key, member.nbytes, Fate.HELD)
    file.seek(end)
    file.truncate()


def _members(descriptor: int, name: str, wanted: ChunkList) -> Iterator[_Member]:
    """The whole members, up to the first that is none, or cut short."""
    size, offset = os.fstat(descriptor).st_size, 0
    while block := os.pread(descriptor, _BLOCK, offset):
        named = _named(block)
        if named is None:
            if not offset and block.strip(b"\0"):
                raise UsageError(f"{name} is no export that was broken off; allowed is to remove it")
            return
        member = _Member(offset, *named, wanted.find(named[0]))
        if member.end > size:
            return
        yield member
        offset = member.end


def _named(block: bytes) -> tuple[ChunkKey, int] | None:
    """Key and bytes of the chunk whose tar header is `block`; `None` if an export writes no such header."""
    try:
        member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        key = key_of(member)
    except (tarfile.HeaderError, UsageError):
        return None
    return (key, member.size) if member_of(key, member.size).tobuf(tarfile.USTAR_FORMAT) == block else None


def _same(descriptor: int, member: _Member) -> bool:
    """Whether the member is sound, and the chunk that the tier holds now."""
    if member.row is None:
        return False
    tier, key, nbytes = member.row
    if nbytes != member.nbytes:
        return False
    data = torch.empty(nbytes, dtype=torch.uint8)
    try:
        _fill(descriptor, member.offset + _BLOCK, data.numpy().data)
        header = Chunk.adopt(data, key).header
        held = tier.read(key, [])
    except ChunkCorrupt:
        return False
    return held is not None and held.header.digest == header.digest


def _fill(descriptor: int, offset: int, target: memoryview) -> None:
    while target:
        count = os.preadv(descriptor, [target[:_PIECE]], offset)
        if not count:
            raise ChunkCorrupt("the file ends early", "truncated")
        offset, target = offset + count, target[count:]


def _move(descriptor: int, start: int, target: int, count: int) -> None:
    """Moves bytes to a lower place of the file."""
    end = start + count
    while start != target and start < end:
        piece = os.pread(descriptor, min(_PIECE, end - start), start)
        if not piece:
            raise OSError(errno.EIO, "the file ends early")
        written = os.pwrite(descriptor, piece, target)
        start, target = start + written, target + written
