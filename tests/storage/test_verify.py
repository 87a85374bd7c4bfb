"""Damage of every kind is found and repaired, and nothing else is found."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from droidspeak.errors import TierUnavailable
from droidspeak.storage import TieredStore
from droidspeak.storage.catalog import PendingWrite
from droidspeak.storage.container import Slot, SlotKind
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.remote import RemoteTier
from droidspeak.storage.s3 import S3Tier
from droidspeak.storage.testing import make_chunk, make_key
from droidspeak.storage.verify import Finding, FindingKind, VerifyCounts, VerifyOptions, verify_tier
from droidspeak.storage.verifydisk import verify_folder
from tests.storage.children import running, started, stopped, write_and_evict
from tests.storage.daemons import serving

QUICK, FULL = VerifyOptions(), VerifyOptions(full=True)
REPAIR = VerifyOptions(full=True, repair=True)
SIZE = make_chunk(0).header.nbytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with DiskTier(tmp_path / "store", min_free=0) as tier:
        for seed in range(6):
            tier.write(make_chunk(seed))
    return tmp_path / "store"


def look(root: Path, options: VerifyOptions = FULL, counts: VerifyCounts | None = None) -> list[Finding]:
    reopen = lambda: DiskTier(root, min_free=0)  # noqa: E731
    return list(verify_folder(root, "disk", options, counts or VerifyCounts(), reopen))


def kinds(findings: list[Finding]) -> list[tuple[str, str | None]]:
    return [(finding.kind, finding.repair) for finding in findings]


def path_of(root: Path, seed: int) -> Path:
    with DiskTier(root, read_only=True) as tier:
        return tier.path(make_key(seed))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def drop_row(root: Path, seed: int) -> None:
    with DiskTier(root, min_free=0) as tier, tier.exclusively() as catalog:
        catalog.remove(make_key(seed))


class TestFolder:
    def test_sound_folder(self, root: Path) -> None:
        counts = VerifyCounts()
        assert look(root, FULL, counts) == []
        sizes = sum(make_chunk(seed).header.nbytes for seed in range(6))
        assert (counts.chunks, counts.nbytes) == (6, sizes)

    def test_quick_look_reads_headers_only(self, root: Path) -> None:
        counts = VerifyCounts()
        assert look(root, QUICK, counts) == []
        assert counts.nbytes == sum(make_chunk(seed).header.data_start for seed in range(6))

    def test_looking_changes_nothing(self, root: Path) -> None:
        flip(path_of(root, 1), -1)
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        look(root)
        after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert after == before

    def test_payload_that_differs_is_found_by_a_full_look_only(self, root: Path) -> None:
        flip(path_of(root, 1), -1)
        assert look(root, QUICK) == []
        (finding,) = look(root)
        assert (finding.kind, finding.key, finding.repair) == (FindingKind.CORRUPT, make_key(1), None)
        assert "v.1" in finding.detail
        assert kinds(look(root, REPAIR)) == [("corrupt", "quarantined")]
        assert look(root) == []
        assert len(list((root / "quarantine").iterdir())) == 1

    def test_a_header_that_differs(self, root: Path) -> None:
        flip(path_of(root, 2), 60)
        assert kinds(look(root, QUICK)) == [("corrupt", None)]

    @pytest.mark.parametrize("left", [0, 5, 100, -1])
    def test_truncated(self, root: Path, left: int) -> None:
        path = path_of(root, 3)
        os.truncate(path, left if left >= 0 else path.stat().st_size + left)
        assert kinds(look(root, QUICK)) == [("truncated", None)]
        assert kinds(look(root, REPAIR)) == [("truncated", "quarantined")]
        assert look(root) == []

    def test_bytes_at_the_end(self, root: Path) -> None:
        path = path_of(root, 3)
        path.write_bytes(path.read_bytes() + b"x")
        assert kinds(look(root, QUICK)) == [("corrupt", None)]

    def test_another_chunks_file(self, root: Path) -> None:
        shutil.copy(path_of(root, 1), path_of(root, 2))
        (finding,) = look(root, QUICK)
        assert (finding.kind, finding.key) == (FindingKind.WRONG_KEY, make_key(2))
        assert kinds(look(root, REPAIR)) == [("wrong_key", "quarantined")]
        with DiskTier(root, read_only=True) as tier:
            assert set(tier.keys()) == {make_key(seed) for seed in (0, 1, 3, 4, 5)}

    def test_row_without_file(self, root: Path) -> None:
        path_of(root, 4).unlink()
        assert kinds(look(root, QUICK)) == [("orphan_row", None)]
        assert kinds(look(root, REPAIR)) == [("orphan_row", "removed")]
        with DiskTier(root, read_only=True) as tier:
            assert tier.usage().chunks == 5

    def test_sound_file_without_row_is_adopted(self, root: Path) -> None:
        drop_row(root, 5)
        assert kinds(look(root, QUICK)) == [("orphan_file", None)]
        assert kinds(look(root, replace(REPAIR, full=False))) == [("orphan_file", "adopted")]
        with DiskTier(root, read_only=True) as tier:
            assert tier.head(make_key(5)) is not None
        assert look(root) == []

    def test_file_without_row_is_not_adopted_unread(self, root: Path) -> None:
        drop_row(root, 5)
        flip(path_of(root, 5), -1)
        assert kinds(look(root, VerifyOptions(repair=True))) == [("corrupt", "quarantined")]
        assert look(root) == []

    def test_stale_row(self, root: Path) -> None:
        other = make_chunk(1, e_layers=(0, 1), codec="zstd")
        path_of(root, 1).write_bytes(other.to_bytes())
        with DiskTier(root, min_free=0) as tier:
            tier.pin(make_key(1))
        (finding,) = look(root, QUICK)
        assert finding.kind is FindingKind.STALE_INDEX
        assert "E layers (1,) instead of (0, 1)" in finding.detail
        assert "codec 'raw' instead of 'zstd'" in finding.detail
        assert kinds(look(root, REPAIR)) == [("stale_index", "renewed")]
        assert look(root) == []
        with DiskTier(root, min_free=0) as tier:
            info = tier.head(make_key(1))
            assert info
            assert info.nbytes == other.header.nbytes
            assert tier.evict(1 << 40) == sum(make_chunk(n).header.nbytes for n in (0, 2, 3, 4, 5))

    def test_what_cannot_be_read_is_left_alone(self, root: Path) -> None:
        path = path_of(root, 4)
        path.unlink()
        path.mkdir()
        for options in (QUICK, REPAIR):
            (finding,) = look(root, options)
            assert (finding.kind, finding.key, finding.repair) == ("unreadable", make_key(4), None)
            assert finding.detail == "Is a directory"

    def test_files_of_somebody_else(self, root: Path) -> None:
        (root / "chunks" / "notes.txt").write_text("hello")
        (finding,) = look(root, QUICK)
        assert (finding.kind, finding.key, finding.place) == ("orphan_file", None, "chunks/notes.txt")
        assert kinds(look(root, REPAIR)) == [("orphan_file", "quarantined")]
        assert look(root) == []

    def test_catalog_that_is_lost(self, root: Path) -> None:
        (root / "catalog.sqlite").unlink()
        (finding,) = look(root, QUICK)
        assert (finding.kind, finding.place) == ("stale_index", "catalog.sqlite")
        assert kinds(look(root, REPAIR)) == [("stale_index", "rebuilt")]
        assert look(root) == []

    def test_catalog_that_is_damaged(self, root: Path) -> None:
        (root / "catalog.sqlite").write_bytes(b"no database at all" * 100)
        assert kinds(look(root, QUICK)) == [("stale_index", None)]
        assert kinds(look(root, REPAIR)) == [("stale_index", "rebuilt")]
        with DiskTier(root, read_only=True) as tier:
            assert tier.usage().chunks == 6

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(TierUnavailable, match="nothing"):
            look(tmp_path / "nothing")

    def test_sample_is_a_share_and_the_same_for_rows_and_files(self, tmp_path: Path) -> None:
        with DiskTier(tmp_path, min_free=0) as tier:
            for seed in range(200):
                tier.write(make_chunk(seed, layers=1, e_layers=()))
        counts = VerifyCounts()
        assert look(tmp_path, VerifyOptions(sample=0.3), counts) == []
        assert 20 < counts.chunks < 120

    def test_slots_larger_than_a_piece_and_empty_ones(self, tmp_path: Path) -> None:
        big = make_chunk(1, layers=1, e_layers=(), tokens=1 << 17)
        empty = make_chunk(2, tokens=0)
        with DiskTier(tmp_path, min_free=0) as tier:
            tier.write(big)
            tier.write(empty)
        assert big.header.records[Slot(SlotKind.K, 0)].nbytes > 1 << 20
        assert look(tmp_path) == []
        flip(path_of(tmp_path, 1), -3)
        assert kinds(look(tmp_path)) == [("corrupt", None)]


def die_in_the_middle(root, when):
    import os
    import signal

    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import make_chunk

    def die(*arguments):
        if when == "published":
            record(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    tier = DiskTier(root, min_free=0)
    record = tier._record
    if when == "filled":
        tier._publish = die
    else:
        tier._record = die
    tier.write(make_chunk(77))


def die_while_evicting(root):
    import os
    import signal

    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import make_chunk

    tier = DiskTier(root, capacity=6 * make_chunk(0).header.nbytes, min_free=0)
    unlink = tier._unlink

    def die(keys):
        unlink(keys)
        os.kill(os.getpid(), signal.SIGKILL)

    tier._unlink = die
    tier.write(make_chunk(77))


class TestBesideOthers:
    @pytest.mark.parametrize("capacity", [None, 10 * SIZE])
    def test_nothing_is_found_while_another_process_writes_evicts_and_deletes(
        self, root: Path, capacity: int | None
    ) -> None:
        with running(write_and_evict, root, 0, 40, capacity) as process:
            started(root, 0)
            for _ in range(40):
                assert look(root, FULL) == []
                assert look(root, QUICK) == []
            assert process.is_alive()

    def test_nothing_is_repaired_while_another_process_writes(self, root: Path) -> None:
        with running(write_and_evict, root, 0, 40, 10 * SIZE) as process:
            started(root, 0)
            for _ in range(20):
                assert look(root, REPAIR) == []
            assert process.is_alive()
            stopped(process, root, 0)
        assert look(root) == []

    def test_real_damage_is_found_and_repaired_beside_a_writer(self, root: Path) -> None:
        flip(path_of(root, 1), -1)
        path_of(root, 2).unlink()
        with running(write_and_evict, root, 100, 140, None):
            started(root, 100)
            assert sorted(kinds(look(root, REPAIR))) == [
                ("corrupt", "quarantined"),
                ("orphan_row", "removed"),
            ]
            assert look(root, FULL) == []

    @pytest.mark.parametrize("when", ["filled", "published"])
    def test_writer_that_was_killed_in_the_middle(self, root: Path, when: str) -> None:
        with running(die_in_the_middle, root, when) as process:
            process.join()
        (finding,) = look(root, QUICK)
        assert (finding.kind, finding.key) == (FindingKind.LEFTOVER, make_key(77))
        (finding,) = look(root, REPAIR)
        assert finding.repair == ("removed" if when == "filled" else "settled")
        assert look(root) == []
        assert not list(root.rglob("*.tmp"))
        with DiskTier(root, read_only=True) as tier:
            assert (tier.head(make_key(77)) is not None) is (when == "published")

    def test_who_was_killed_while_it_evicted_leaves_rows_without_files(self, root: Path) -> None:
        with running(die_while_evicting, root) as process:
            process.join()
        assert set(kinds(look(root, QUICK))) == {("orphan_row", None)}
        assert set(kinds(look(root, REPAIR))) == {("orphan_row", "removed")}
        assert look(root) == []

    def test_temporary_file_without_intent(self, root: Path) -> None:
        lost = path_of(root, 1).with_name(f".{make_key(1).prefix}.12345-abcdef01.0.tmp")
        lost.write_bytes(b"half")
        assert kinds(look(root, QUICK)) == [("leftover", None)]
        assert kinds(look(root, REPAIR)) == [("leftover", "removed")]
        assert look(root) == []

    def test_writes_under_way_are_no_leftovers(self, root: Path) -> None:
        with DiskTier(root, min_free=0) as tier:
            mark = tier._writable()
            temp = tier._folder.temp(make_key(9), mark.writer, 0)
            with tier.exclusively() as catalog:
                catalog.begin_write(PendingWrite(str(temp.relative_to(root)), make_key(9), 100, mark.writer))
            temp.parent.mkdir(parents=True, exist_ok=True)
            temp.write_bytes(b"half")
            assert look(root, FULL) == []


class TestOtherTiers:
    def test_s3(self, s3_endpoint: str) -> None:
        tier = S3Tier("verify", "some/folder", endpoint=s3_endpoint)
        tier._client.create_bucket(Bucket="verify")
        with tier:
            for seed in range(5):
                tier.write(make_chunk(seed))
            counts = VerifyCounts()
            assert list(verify_tier(tier, FULL, counts)) == []
            assert counts.nbytes == sum(make_chunk(seed).header.nbytes for seed in range(5))
            self._damage(tier)
            quick = {finding.key: finding.kind for finding in verify_tier(tier, QUICK, VerifyCounts())}
            assert quick == {
                make_key(0): FindingKind.TRUNCATED,
                make_key(1): FindingKind.WRONG_KEY,
                make_key(2): FindingKind.STALE_INDEX,
            }
            full = {finding.key: finding.kind for finding in verify_tier(tier, FULL, VerifyCounts())}
            assert full == {**quick, make_key(3): FindingKind.CORRUPT}
            repaired = {finding.key: finding.repair for finding in verify_tier(tier, REPAIR, VerifyCounts())}
            assert repaired == {
                make_key(0): "quarantined",
                make_key(1): "quarantined",
                make_key(2): "renewed",
                make_key(3): "quarantined",
            }
            assert list(verify_tier(tier, FULL, VerifyCounts())) == []
            assert set(tier.keys()) == {make_key(2), make_key(4)}

    @staticmethod
    def _damage(tier: S3Tier) -> None:
        def put(key: ChunkKey, data: bytes, **metadata: str) -> None:
            tier._client.put_object(Bucket="verify", Key=tier._path(key), Body=data, Metadata=metadata)

        put(make_key(0), make_chunk(0).to_bytes()[:-1])
        put(make_key(1), make_chunk(4).to_bytes())
        put(make_key(2), make_chunk(2).to_bytes(), tokens="99", codec="raw", **{"e-layers": ""})
        data = bytearray(make_chunk(3).to_bytes())
        data[-1] ^= 1
        put(make_key(3), bytes(data))

    def test_daemon_reads_where_the_chunks_are(self, root: Path) -> None:
        store = TieredStore([MemoryTier(1 << 20), DiskTier(root, min_free=0)], promote=False)
        flip(path_of(root, 1), -1)
        with serving(store) as port, RemoteTier("127.0.0.1", port) as tier:
            assert list(verify_tier(tier, QUICK, VerifyCounts())) == []
            (finding,) = verify_tier(tier, FULL, VerifyCounts())
            assert (finding.kind, finding.key) == (FindingKind.CORRUPT, make_key(1))
            assert "tier disk" in finding.detail
            assert kinds(list(verify_tier(tier, REPAIR, VerifyCounts()))) == [("corrupt", "quarantined")]
            assert list(verify_tier(tier, FULL, VerifyCounts())) == []
            assert make_key(1) not in set(tier.keys())

    def test_memory(self) -> None:
        with MemoryTier(1 << 20) as tier:
            tier.write(make_chunk(1))
            counts = VerifyCounts()
            assert list(verify_tier(tier, FULL, counts)) == []
            assert counts.chunks == 1

    def test_unreachable_is_no_finding(self) -> None:
        with RemoteTier("127.0.0.1", 9, timeout=0.2) as tier, pytest.raises(TierUnavailable):
            list(verify_tier(tier, QUICK, VerifyCounts()))


def test_a_locked_catalog_is_no_finding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("droidspeak.storage.catalogfile._BUSY_SECONDS", 0.05)
    path_of(root, 4).unlink()
    with closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TierUnavailable, match="locked"):
            look(root)
