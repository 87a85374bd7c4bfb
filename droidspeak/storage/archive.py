"""A store as one file: a tar archive of chunk files.

    SOURCE/SHARD/LINK.safetensors    each member is exactly the chunk's file, so any tool can unpack it,
                                     and any safetensors reader opens what it unpacked

Members are written and read one after the other: an archive may be a pipe. Nothing is ever unpacked by its
path: a member's name says which chunk it must be, and the chunk's own header and checksums say whether it is.

Format: POSIX.1-1988 (ustar); archives that GNU tar or another tool made of the same files are read too.
"""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterable, Iterator
from typing import IO

import torch

from droidspeak.errors import ChunkCorrupt, StorageError, UsageError
from droidspeak.storage.chunklist import Row
from droidspeak.storage.container import MAX_HEADER_BYTES, Chunk, ChunkHeader
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.spread import spread
from droidspeak.storage.tier import Tier
from droidspeak.storage.transfer import Copied, Fate, holds_same

__all__ = ["ArchiveCut", "Refused", "export_chunks", "import_chunks", "key_of", "member_of"]

_SUFFIX = ".safetensors"
_READERS = 2
MAX_CHUNK_BYTES = 8 << 30
"""An archive with a larger member is not read on: passing over what is not there takes long too."""


class ArchiveCut(StorageError):
    """The archive ends early, or cannot be read on; all chunks before that have been read."""


class Refused(ValueError):
    """A member that is no chunk's file."""


def export_chunks(rows: Iterable[Row], file: IO[bytes]) -> Generator[Copied, None, None]:
    """Writes the chunks of `rows` to `file`, from where it stands, and tells the fate of each.

    Raises:
        OSError: `file` cannot be written.
        TierUnavailable, TierTimeout: a tier does not answer.
    """
    written = 0
    for key, nbytes, chunk in spread(_read, rows, _READERS):
        if isinstance(chunk, Chunk):
            written += _write(file, key, chunk)
            yield Copied(key, chunk.header.nbytes, Fate.COPIED)
        else:
            yield Copied(key, nbytes, Fate.FAILED if chunk else Fate.GONE, chunk or "")
    end = 2 * tarfile.BLOCKSIZE
    file.write(bytes(end + -(written + end) % tarfile.RECORDSIZE))


def _write(file: IO[bytes], key: ChunkKey, chunk: Chunk) -> int:
    """One member. Not by the tarfile module, whose streams take a chunk in pieces of 10 KB."""
    nbytes = chunk.header.nbytes
    padding = -nbytes % tarfile.BLOCKSIZE
    file.write(member_of(key, nbytes).tobuf(tarfile.USTAR_FORMAT))
    for buffer in chunk.buffers():
        file.write(buffer)
    file.write(bytes(padding))
    return tarfile.BLOCKSIZE + nbytes + padding


def member_of(key: ChunkKey, nbytes: int) -> tarfile.TarInfo:
    """The member that a chunk of `nbytes` is written as; its header depends on nothing else."""
    member = tarfile.TarInfo(f"{key}{_SUFFIX}")
    member.size = nbytes
    return member


def _read(row: Row) -> tuple[ChunkKey, int, Chunk | str | None]:
    """The chunk, or why it cannot be read; `None` if it is gone."""
    tier, key, nbytes = row
    try:
        chunk = tier.read(key)
        return key, nbytes, chunk.verify() if chunk else None
    except ChunkCorrupt as error:
        return key, nbytes, str(error)


def import_chunks(file: IO[bytes], target: Tier) -> Iterator[Copied | Refused]:
    """Writes the chunks of the archive in `file` to `target`, and tells the fate of each member.

    Members that are no chunk's file are refused and passed over, as are chunks that are not what they say.

    Raises:
        ArchiveCut: `file` is no archive, or ends early; what came before is in `target`.
        TierUnavailable, TierTimeout, TierFull: the tier cannot be written.
    """
    try:
        with tarfile.open(mode="r|", fileobj=file, tarinfo=_Member) as archive:
            for member in archive:
                if member.size > MAX_CHUNK_BYTES:
                    raise ArchiveCut(f"a member of {member.size} bytes; allowed are {MAX_CHUNK_BYTES}")
                if not member.isdir():
                    yield _import(archive, member, target)
            if not getattr(archive, "complete", False):
                raise ArchiveCut("the archive ends without its end mark: it was cut short")
    except tarfile.TarError as error:
        raise ArchiveCut(f"no tar archive, or one that was cut short: {error}") from None


class _Member(tarfile.TarInfo):
    """A member that notes in its archive when it is the end mark. The tarfile module takes the end of the
    file for one too."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # not in typeshed
            tarfile_.complete = True  # type: ignore[attr-defined]
            raise


def _import(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Tier) -> Copied | Refused:
    try:
        key = key_of(member)
    except UsageError as error:
        return Refused(f"{member.name[:200]!r}: {error}")
    content = archive.extractfile(member)
    assert content is not None
    try:
        return _store(key, member.size, content, target)
    except ChunkCorrupt as error:
        return Copied(key, member.size, Fate.FAILED, str(error))


def key_of(member: tarfile.TarInfo) -> ChunkKey:
    """The key of the chunk that a member is called after. Raises `UsageError`."""
    if not member.isreg():
        raise UsageError("allowed are plain files")
    if not member.name.endswith(_SUFFIX):
        raise UsageError(f"allowed is SOURCE/SHARD/LINK{_SUFFIX}")
    return ChunkKey.parse(member.name.removeprefix("./").removesuffix(_SUFFIX))


def _store(key: ChunkKey, nbytes: int, content: IO[bytes], target: Tier) -> Copied:
    # The header first: what is held already, or is no chunk, need not be taken into memory.
    start = _exactly(content, 8)
    length = ChunkHeader.length(start)
    start += _exactly(content, min(length, nbytes, MAX_HEADER_BYTES) - len(start))
    header = ChunkHeader.parse(start).expect(key, nbytes)
    held = target.head(key)
    if held and holds_same(target, held, lambda: header.digest):
        return Copied(key, nbytes, Fate.HELD)
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = data.numpy().data
    view[: len(start)] = start
    _fill(content, view[len(start) :])
    target.write(Chunk.adopt(data, key))
    return Copied(key, nbytes, Fate.COPIED)


def _exactly(content: IO[bytes], count: int) -> bytes:
    data = content.read(count)
    if len(data) < count:
        raise ChunkCorrupt(f"{len(data)} bytes instead of {count}", "truncated")
    return data


def _fill(content: IO[bytes], target: memoryview) -> None:
    while target:
        piece = content.read(min(len(target), 1 << 20))
        if not piece:
            raise tarfile.ReadError("unexpected end of data")
        target[: len(piece)] = piece
        target = target[len(piece) :]
