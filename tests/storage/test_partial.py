"""Exports that were broken off: what of their archive is kept, what is not, and that it ends whole."""

from __future__ import annotations

import fcntl
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from droidspeak.errors import DroidSpeakError, TierUnavailable, UsageError
from droidspeak.storage.archive import export_chunks, import_chunks, member_of
from droidspeak.storage.chunklist import ChunkList
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.partial import keep_chunks, partial_file, partial_path
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.testing import make_chunk, make_key
from droidspeak.storage.tier import Tier
from droidspeak.storage.wrappers import FaultyTier, fail

COUNT = 6
# In the order of an archive.
SEEDS = sorted(range(COUNT), key=lambda seed: str(make_key(seed)))
# No multiples of what a tar file pads to.
TOKENS = [17 * place for place in range(1, COUNT + 1)]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[DiskTier]:
    with DiskTier(tmp_path / "from", min_free=0) as tier:
        for seed, tokens in zip(SEEDS, TOKENS, strict=True):
            tier.write(make_chunk(seed, tokens=tokens))
        yield tier


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "all.tar"


def export(archive: Path, *tiers: Tier, conditions: tuple[Condition, ...] = ()) -> dict[str, int]:
    """An export as the command line makes it; how many chunks met which fate."""
    with partial_file(archive) as file, ChunkList(tiers, Selection(conditions)) as chunks:
        told = [*keep_chunks(file, chunks), *export_chunks(chunks, file)]
    return dict(Counter(one.fate.value for one in told))


def contents(archive: Path) -> dict[str, bytes]:
    """The members' bytes; each is there once."""
    with tarfile.open(archive) as file:
        members = {member.name: file.extractfile(member) for member in file.getmembers()}
        assert len(members) == len(file.getmembers())
        return {name: content.read() for name, content in members.items() if content}


def assert_as_in_one_go(archive: Path, *tiers: Tier) -> None:
    """`archive` holds what an export without a beginning makes, and an import takes every chunk."""
    assert not partial_path(archive).exists()
    other = archive.with_name("other.tar")
    export(other, *tiers)
    assert contents(archive) == contents(other)
    other.unlink()
    with archive.open("rb") as file, MemoryTier(1 << 24) as target:
        assert {getattr(one, "fate", None) for one in import_chunks(file, target)} <= {"copied"}


def begun(archive: Path, source: Tier) -> tuple[bytes, list[tarfile.TarInfo]]:
    """The bytes of a whole archive, as a broken-off one; its members."""
    export(archive, source)
    data = archive.read_bytes()
    archive.replace(partial_path(archive))
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return data, file.getmembers()


def break_off(archive: Path, content: bytes) -> None:
    """An export that fails when it has written `content`."""
    with suppress(ZeroDivisionError), partial_file(archive) as file:
        file.write(content)
        raise ZeroDivisionError


def test_nothing_is_there_under_the_name_until_it_is_whole(archive: Path) -> None:
    with partial_file(archive) as file:
        file.write(b"some")
        file.flush()
        assert not archive.exists()
        assert partial_path(archive).read_bytes() == b"some"
    assert archive.read_bytes() == b"some"
    assert not partial_path(archive).exists()


def test_what_was_written_stays_after_an_error_and_an_empty_file_does_not(archive: Path) -> None:
    for content in (b"", b"some"):
        break_off(archive, content)
        assert partial_path(archive).exists() is bool(content)
    assert not archive.exists()


@pytest.mark.parametrize(
    ("where", "held"),
    [
        ("first", 0),
        ("header", 2),
        ("payload", 2),
        ("padding", 2),
        ("boundary", 2),
        ("end mark", 6),
        ("whole", 6),
    ],
)
def test_goes_on_wherever_it_was_cut(source: DiskTier, archive: Path, where: str, held: int) -> None:
    data, members = begun(archive, source)
    third, last = members[2], members[-1]
    assert third.size % 512
    cut = {
        "first": 700,
        "header": third.offset + 100,
        "payload": third.offset_data + 700,
        "padding": third.offset_data + third.size,
        "boundary": third.offset,
        "end mark": last.offset_data + -(-last.size // 512) * 512 + 512,
        "whole": len(data),
    }[where]
    partial_path(archive).write_bytes(data[:cut])
    told = export(archive, source)
    assert told == {fate: count for fate, count in (("held", held), ("copied", COUNT - held)) if count}
    assert_as_in_one_go(archive, source)


@pytest.mark.parametrize("place", range(COUNT))
def test_chunks_that_have_left_the_store_leave_the_archive(
    source: DiskTier, archive: Path, place: int
) -> None:
    begun(archive, source)
    source.delete(make_key(SEEDS[place]))
    assert export(archive, source) == {"held": COUNT - 1}
    assert_as_in_one_go(archive, source)


def test_chunks_that_were_replaced_are_written_anew(source: DiskTier, archive: Path) -> None:
    begun(archive, source)
    source.write(make_chunk(99, key=make_key(SEEDS[1]), tokens=TOKENS[1]))
    source.write(make_chunk(SEEDS[3], tokens=256))
    source.write(make_chunk(SEEDS[4], tokens=TOKENS[4], e_layers=()))
    assert export(archive, source) == {"held": 3, "copied": 3}
    assert_as_in_one_go(archive, source)


def test_chunks_that_the_filters_do_not_select_leave_the_archive(source: DiskTier, archive: Path) -> None:
    begun(archive, source)
    chosen = Condition("tokens", ">", TOKENS[2])
    assert export(archive, source, conditions=(chosen,)) == {"held": 3}
    assert contents(archive).keys() == {f"{make_key(seed)}.safetensors" for seed in SEEDS[3:]}


def test_of_another_store_nothing_is_kept(source: DiskTier, archive: Path) -> None:
    begun(archive, source)
    with MemoryTier(1 << 20) as other:
        other.write(make_chunk(77))
        assert export(archive, other) == {"copied": 1}
        assert_as_in_one_go(archive, other)


def test_a_chunk_is_kept_once_of_whichever_tier(source: DiskTier, archive: Path) -> None:
    data, members = begun(archive, source)
    second = data[members[1].offset : members[2].offset]
    partial_path(archive).write_bytes(data[: members[2].offset] + second + data[members[2].offset :])
    with MemoryTier(1 << 20) as fast:
        fast.write(make_chunk(SEEDS[1], tokens=TOKENS[1]))
        assert export(archive, fast, source) == {"held": COUNT}
    assert_as_in_one_go(archive, source)


@pytest.mark.parametrize("of", ["payload", "header"])
def test_damaged_members_are_written_anew(source: DiskTier, archive: Path, of: str) -> None:
    data, members = begun(archive, source)
    broken = bytearray(data)
    broken[members[2].offset_data + (members[2].size - 1 if of == "payload" else 60)] ^= 1
    partial_path(archive).write_bytes(broken)
    assert export(archive, source) == {"held": COUNT - 1, "copied": 1}
    assert_as_in_one_go(archive, source)


def test_behind_a_damaged_tar_header_nothing_is_trusted(source: DiskTier, archive: Path) -> None:
    data, members = begun(archive, source)
    broken = bytearray(data)
    broken[members[2].offset + 20] ^= 1
    partial_path(archive).write_bytes(broken)
    assert export(archive, source) == {"held": 2, "copied": COUNT - 2}
    assert_as_in_one_go(archive, source)


def test_lost_pages_are_no_chunks(source: DiskTier, archive: Path) -> None:
    data, members = begun(archive, source)
    for start in (0, members[2].offset, members[2].offset_data):
        partial_path(archive).write_bytes(data[:start] + bytes(len(data) - start))
        assert export(archive, source)["copied"] == COUNT - (2 if start else 0)
        assert_as_in_one_go(archive, source)


def test_a_size_that_nobody_has_is_the_end(source: DiskTier, archive: Path) -> None:
    data, members = begun(archive, source)
    header = member_of(make_key(SEEDS[2]), 1 << 32).tobuf(tarfile.USTAR_FORMAT)
    partial_path(archive).write_bytes(data[: members[2].offset] + header + bytes(4096))
    assert export(archive, source) == {"held": 2, "copied": COUNT - 2}
    assert_as_in_one_go(archive, source)


@pytest.mark.parametrize("content", [b"my notes", b"PK\3\4" * 1000, b"\0" * 511 + b"x" + b"\0" * 4096])
def test_what_is_no_export_is_refused_and_left_alone(source: DiskTier, archive: Path, content: bytes) -> None:
    partial_path(archive).write_bytes(content)
    with pytest.raises(UsageError, match=r"all\.tar\.partial is no export that was broken off"):
        export(archive, source)
    assert partial_path(archive).read_bytes() == content
    assert not archive.exists()


def test_archives_of_others_are_refused(source: DiskTier, archive: Path) -> None:
    begun(archive, source)
    with tarfile.open(partial_path(archive), "w") as file:
        file.add(source.path(make_key(1)), f"{make_key(1)}.safetensors")
    with pytest.raises(UsageError, match="is no export"):
        export(archive, source)


def test_links_are_not_followed(source: DiskTier, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    partial_path(archive).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        export(archive, source)


@pytest.mark.parametrize("calls", range(1, 9))
def test_what_breaks_off_while_members_move_up_can_be_gone_on_with(
    source: DiskTier, archive: Path, calls: int
) -> None:
    begun(archive, source)
    source.delete(make_key(SEEDS[0]))
    source.delete(make_key(SEEDS[2]))
    # The first reads compare what is kept, later ones are of the export.
    source.write(make_chunk(100))
    source.write(make_chunk(101))
    broken = FaultyTier(source, {"read": [*[None] * (calls - 1), *[fail(TierUnavailable("unplugged"))] * 20]})
    if calls <= 4 + 2:
        with pytest.raises(TierUnavailable, match="unplugged"):
            export(archive, broken)
        assert not archive.exists()
        assert partial_path(archive).exists()
    export(archive, source)
    assert_as_in_one_go(archive, source)


def test_two_exports_do_not_write_one_file(archive: Path) -> None:
    with partial_file(archive) as file:
        file.write(b"mine")
        with pytest.raises(DroidSpeakError, match="another export is writing it"), partial_file(archive):
            pass
    assert archive.read_bytes() == b"mine"
    with partial_file(archive) as file:
        file.write(b"more")
    assert archive.read_bytes() == b"more"


def test_a_file_that_was_renamed_before_its_lock_was_free_is_another_one(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial_path(archive).write_bytes(b"first")
    lock = fcntl.flock

    def late(*arguments: int) -> None:
        if not archive.exists():
            partial_path(archive).replace(archive)
        lock(*arguments)

    monkeypatch.setattr("droidspeak.storage.partial.fcntl.flock", late)
    break_off(archive, b"second")
    assert archive.read_bytes() == b"first"
    assert partial_path(archive).read_bytes() == b"second"
