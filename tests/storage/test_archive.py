"""A store as one tar file: whole, cut, and made by somebody who means no good."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from droidspeak.errors import TierFull
from droidspeak.storage.archive import ArchiveCut, Refused, export_chunks, import_chunks
from droidspeak.storage.chunklist import ChunkList, Row
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.selection import Selection
from droidspeak.storage.testing import assert_holds, make_chunk, make_key
from droidspeak.storage.tier import Tier

NAME = f"{make_key(1)}.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[DiskTier]:
    with DiskTier(tmp_path / "from", min_free=0) as tier:
        for seed in range(5):
            tier.write(make_chunk(seed))
        yield tier


@pytest.fixture
def target() -> Iterator[Tier]:
    with MemoryTier(1 << 20) as tier:
        yield tier


def rows_of(source: Tier) -> list[Row]:
    with ChunkList([source], Selection()) as chunks:
        return list(chunks)


def exported(source: Tier) -> bytes:
    file = io.BytesIO()
    assert {one.fate for one in export_chunks(rows_of(source), file)} <= {"copied"}
    return file.getvalue()


def fates(data: bytes, target: Tier) -> dict[str, int]:
    told = import_chunks(io.BytesIO(data), target)
    return dict(Counter("refused" if isinstance(one, Refused) else one.fate.value for one in told))


def packed(*members: tuple[str, bytes], **attributes: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(mode="w", fileobj=file) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def test_there_and_back(source: DiskTier, target: Tier) -> None:
    data = exported(source)
    assert fates(data, target) == {"copied": 5}
    for seed in range(5):
        assert_holds(target.read(make_key(seed)), make_chunk(seed))
    assert fates(data, target) == {"held": 5}
    target.write(make_chunk(99, key=make_key(2)))
    assert fates(data, target) == {"held": 4, "copied": 1}


def test_empty(target: Tier) -> None:
    with MemoryTier(1 << 20) as nothing:
        assert fates(exported(nothing), target) == {}


def test_other_tools_read_it_and_what_they_make_is_read(
    source: DiskTier, target: Tier, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(exported(source))
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", "../a.tar"], check=True, cwd=tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / NAME).read_bytes() == make_chunk(1).to_bytes()
    with safe_open(tmp_path / "unpacked" / NAME, "pt") as file:
        assert set(file.keys()) == {slot.name for slot in make_chunk(1).header.records}
    for style in ("gnu", "pax"):
        command = ["tar", f"--format={style}", "-cf", f"../{style}.tar", "."]
        subprocess.run(command, check=True, cwd=tmp_path / "unpacked")
        with MemoryTier(1 << 20) as other:
            assert fates((tmp_path / f"{style}.tar").read_bytes(), other) == {"copied": 5}


@pytest.mark.parametrize("where", ["header", "payload", "boundary", "end mark", "nothing"])
def test_cut_archive_gives_what_came_before(source: DiskTier, target: Tier, where: str) -> None:
    data = exported(source)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        third, last = archive.getmembers()[2], archive.getmembers()[4]
    cut = {
        "header": third.offset + 100,
        "payload": third.offset_data + 700,
        "boundary": third.offset,
        "end mark": last.offset_data + -(-last.size // 512) * 512,
        "nothing": 0,
    }[where]
    with pytest.raises(ArchiveCut):
        fates(data[:cut], target)
    assert target.usage().chunks == (0 if where == "nothing" else 5 if where == "end mark" else 2)


def test_no_archive(target: Tier) -> None:
    with pytest.raises(ArchiveCut, match="no tar archive"):
        fates(b"PK\3\4 this is something else" * 1000, target)


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd.safetensors",
        f"../{NAME}",
        f"/{NAME}",
        NAME.upper(),
        NAME.removesuffix(".safetensors"),
        f"{'a' * 64}/0of1/../{'b' * 64}.safetensors",
        f"{'a' * 64}/0of1/{'b' * 63}.safetensors",
        "notes.txt",
    ],
)
def test_names_that_are_no_keys_are_refused(name: str, target: Tier, tmp_path: Path) -> None:
    data = packed((name, make_chunk(1).to_bytes()), (NAME, make_chunk(1).to_bytes()))
    assert fates(data, target) == {"refused": 1, "copied": 1}
    assert list(target.keys()) == [make_key(1)]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE], ids=repr
)
def test_what_is_no_plain_file_is_refused(kind: bytes, target: Tier) -> None:
    assert fates(packed((NAME, b""), type=kind, linkname="/etc/passwd"), target) == {"refused": 1}


def _flipped(offset: int) -> bytes:
    data = bytearray(make_chunk(1).to_bytes())
    data[offset] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (make_chunk(2).to_bytes(), "holds chunk"),
        (_flipped(-1), "checksum"),
        (_flipped(50), "digest"),
        (make_chunk(1).to_bytes()[:-1], "instead of"),
        (make_chunk(1).to_bytes() + b"x", "instead of"),
        (make_chunk(1).to_bytes()[:100], ""),
        (b"", "instead of"),
        (b"\xff" * 4096, "believable"),
    ],
)
def test_chunks_that_are_not_what_they_say_are_not_stored(content: bytes, told: str, target: Tier) -> None:
    data = packed((NAME, content), (f"{make_key(2)}.safetensors", make_chunk(2).to_bytes()))
    failed, copied = import_chunks(io.BytesIO(data), target)
    assert not isinstance(failed, Refused)
    assert failed.fate == "failed"
    assert told in failed.detail
    assert not isinstance(copied, Refused)
    assert copied.fate == "copied"
    assert list(target.keys()) == [make_key(2)]


def test_a_size_that_nobody_has_ends_the_import(target: Tier) -> None:
    member = tarfile.TarInfo(NAME)
    member.size = 1 << 40
    with pytest.raises(ArchiveCut, match="allowed are 8589934592"):
        fates(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096, target)


def test_damaged_and_lost_chunks_are_left_out(source: DiskTier, target: Tier) -> None:
    path = source.path(make_key(1))
    path.write_bytes(_flipped(-1))
    chunks = rows_of(source)
    source.delete(make_key(2))
    file = io.BytesIO()
    told = {one.key: one.fate.value for one in export_chunks(chunks, file)}
    assert told == {
        make_key(seed): fate for seed, fate in enumerate(["copied", "failed", "gone", "copied", "copied"])
    }
    assert fates(file.getvalue(), target) == {"copied": 3}


def test_full_tier_ends_the_import(source: DiskTier) -> None:
    with MemoryTier(100) as small, pytest.raises(TierFull):
        fates(exported(source), small)
