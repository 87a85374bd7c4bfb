"""Copies between tiers: checked, paced, resumable; nothing is ever there by half."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from droidspeak.errors import TierFull, TierUnavailable
from droidspeak.storage import TieredStore
from droidspeak.storage.chunklist import ChunkList, Row
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.remote import RemoteTier
from droidspeak.storage.s3 import S3Tier
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.testing import assert_holds, make_chunk, make_key
from droidspeak.storage.tier import Tier
from droidspeak.storage.transfer import CopyOptions, Fate, Pace, copy_chunks
from droidspeak.storage.wrappers import FaultyTier, fail, hang
from tests.storage.children import running, started, write_and_evict
from tests.storage.daemons import serving

SIZE = make_chunk(0).header.nbytes


@pytest.fixture
def source(tmp_path: Path) -> Iterator[DiskTier]:
    with DiskTier(tmp_path / "from", min_free=0) as tier:
        for seed in range(8):
            tier.write(make_chunk(seed))
        yield tier


@pytest.fixture
def target(tmp_path: Path) -> Iterator[DiskTier]:
    with DiskTier(tmp_path / "to", min_free=0) as tier:
        yield tier


def listed(source: Tier, *conditions: Condition) -> list[Row]:
    with ChunkList([source], Selection(conditions)) as chunks:
        return list(chunks)


def fates(source: Tier, target: Tier, options: CopyOptions | None = None) -> dict[str, int]:
    rows = listed(source)
    return dict(Counter(copied.fate.value for copied in copy_chunks(rows, target, options or CopyOptions())))


def assert_same(source: Tier, target: Tier, count: int = 8) -> None:
    keys = list(source.keys())
    assert len(keys) == count
    for key in keys:
        chunk = source.read(key)
        assert chunk is not None
        assert_holds(target.read(key), chunk)


def test_copies_all_and_then_nothing(source: DiskTier, target: DiskTier) -> None:
    assert fates(source, target) == {"copied": 8}
    assert_same(source, target)
    assert fates(source, target) == {"held": 8}


def test_what_differs_is_copied_again(source: DiskTier, target: DiskTier) -> None:
    fates(source, target)
    same_size = make_chunk(100, key=make_key(3))
    assert same_size.header.nbytes == SIZE
    target.write(same_size)
    target.write(make_chunk(4, e_layers=()))
    assert fates(source, target) == {"copied": 2, "held": 6}
    assert_same(source, target)


def test_only_what_is_selected(source: DiskTier, target: DiskTier) -> None:
    rows = listed(source, Condition("prefix", "=", (make_key(5).prefix,)))
    assert rows == [(source, make_key(5), SIZE)]
    assert [copied.fate for copied in copy_chunks(rows, target, CopyOptions())] == [Fate.COPIED]


def test_dry_run_changes_nothing(source: DiskTier, target: DiskTier) -> None:
    target.write(make_chunk(2))
    assert fates(source, target, CopyOptions(dry_run=True)) == {"copied": 7, "held": 1}
    assert target.usage().chunks == 1


def test_damaged_chunks_are_not_copied(source: DiskTier, target: DiskTier) -> None:
    data = bytearray(source.path(make_key(1)).read_bytes())
    data[-1] ^= 1
    source.path(make_key(1)).write_bytes(data)
    copied = list(copy_chunks(listed(source), target, CopyOptions()))
    (failed,) = [one for one in copied if one.fate is Fate.FAILED]
    assert failed.key == make_key(1)
    assert "v.1 differs from its checksum" in failed.detail
    assert target.usage().chunks == 7


def test_chunks_that_left_meanwhile_are_no_failures(source: DiskTier, target: DiskTier) -> None:
    rows = listed(source)
    source.delete(make_key(6))
    told = Counter(one.fate for one in copy_chunks(rows, target, CopyOptions()))
    assert told == {Fate.COPIED: 7, Fate.GONE: 1}


def test_destination_that_keeps_nothing_is_found_out(source: DiskTier) -> None:
    class Forgetful(MemoryTier):
        def write(self, chunk: object) -> None:
            pass

    with Forgetful(1 << 20) as target:
        assert fates(source, target) == {"failed": 8}


def test_full_destination_ends_the_copy(source: DiskTier, tmp_path: Path) -> None:
    with DiskTier(tmp_path / "small", capacity=SIZE - 1, min_free=0) as target, pytest.raises(TierFull):
        fates(source, target)


def test_goes_on_where_it_was_broken_off(source: DiskTier, target: DiskTier) -> None:
    broken = FaultyTier(target, {"write": [None, None, fail(TierUnavailable("unplugged"))]})
    with pytest.raises(TierUnavailable, match="unplugged"):
        fates(source, broken, CopyOptions(transfers=1))
    held = target.usage().chunks
    assert 2 <= held < 8
    assert fates(source, target) == {"held": held, "copied": 8 - held}
    assert_same(source, target)


def test_stopping_early_leaves_whole_chunks_and_waits_for_nobody(source: DiskTier, target: DiskTier) -> None:
    slow = FaultyTier(target, {"write": [hang(0.2)] * 8})
    copying = copy_chunks(listed(source), slow, CopyOptions(bandwidth=SIZE // 1000))
    copying.close()
    assert not [thread for thread in threading.enumerate() if "spread" in thread.name]
    assert not list(target.root.rglob("*.tmp"))


def test_pace_adds_up_over_threads() -> None:
    pace = Pace(1000)
    assert all(pace.wait(50) for _ in range(3))
    assert pace._free_at > 0
    pace.wait(10**9)
    waiting = threading.Thread(target=pace.wait, args=(1,))
    waiting.start()
    pace.stop()
    waiting.join(30)
    assert not waiting.is_alive()
    assert pace.wait(1) is False


def test_between_kinds_of_tiers(source: DiskTier, target: DiskTier, s3_endpoint: str) -> None:
    store = TieredStore([MemoryTier(1 << 20)])
    with S3Tier("transfer", endpoint=s3_endpoint) as bucket, serving(store) as port:
        bucket._client.create_bucket(Bucket="transfer")
        with RemoteTier("127.0.0.1", port) as daemon:
            for one, other in ((source, bucket), (bucket, daemon), (daemon, target)):
                assert fates(one, other) == {"copied": 8}
                assert fates(one, other) == {"held": 8}
            assert_same(source, target)


def test_beside_a_process_that_writes_and_evicts(source: DiskTier, target: DiskTier) -> None:
    with running(write_and_evict, source.root, 100, 140, 30 * SIZE) as process:
        started(source.root, 100)
        seen: Counter[str] = Counter()
        while target.usage().chunks < 30 or seen["held"] < 10:
            told = fates(source, target)
            assert "failed" not in told
            seen.update(told)
            assert process.is_alive()
    for key in list(target.keys()):
        seed = next(seed for seed in range(140) if make_key(seed) == key)
        assert_holds(target.read(key), make_chunk(seed))
