"""What leaves by rule, and what stays because somebody uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.pruning import PruneRule, carry_out, plan
from droidspeak.storage.remote import RemoteTier
from droidspeak.storage.s3 import S3Tier
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.testing import make_chunk, make_key
from droidspeak.storage.tier import Tier
from tests.storage.children import running, started, stopped, write_and_evict
from tests.storage.daemons import serving

SIZE = make_chunk(0).header.nbytes


@pytest.fixture
def tier(tmp_path: Path) -> Tier:
    tier = DiskTier(tmp_path / "store", min_free=0)
    for seed in range(6):
        tier.write(make_chunk(seed, key=make_key(seed, source=seed % 2)))
    return tier


def of_source(source: int) -> Selection:
    return Selection((Condition("source", "=", (make_key(0, source=source).source,)),))


def seeds(tier: Tier) -> set[int]:
    known = {make_key(seed, source=seed % 2): seed for seed in range(50)}
    return {known[key] for key in list(tier.keys())}


def test_by_source(tier: DiskTier) -> None:
    rule = PruneRule(of_source(1))
    planned = plan(tier, rule)
    assert (planned.chunks, planned.nbytes) == (3, 3 * SIZE)
    assert planned.sources == {make_key(0, source=1).source: (3, 3 * SIZE)}
    assert seeds(tier) == set(range(6))
    assert carry_out(tier, rule) == planned
    assert seeds(tier) == {0, 2, 4}


def test_least_recently_used_leave_until_the_tier_is_small(tier: DiskTier) -> None:
    tier.read(make_key(0))
    tier.flush()
    done = carry_out(tier, PruneRule(max_size=2 * SIZE + 1))
    assert done.chunks == 4
    assert seeds(tier) == {0, 5}
    assert plan(tier, PruneRule(max_size=2 * SIZE)).chunks == 0


def test_size_of_the_whole_tier_counts_but_only_the_chosen_leave(tier: DiskTier) -> None:
    assert carry_out(tier, PruneRule(of_source(1), max_size=4 * SIZE)).chunks == 2
    assert seeds(tier) == {0, 2, 4, 5}
    assert carry_out(tier, PruneRule(of_source(1), max_size=0)).chunks == 1
    assert seeds(tier) == {0, 2, 4}


def test_unused_since(tier: DiskTier) -> None:
    now = time.time_ns()
    assert plan(tier, PruneRule(unused_since=now - 10**12)).chunks == 0
    tier.read(make_key(2))
    tier.flush()
    assert carry_out(tier, PruneRule(unused_since=now)).chunks == 5
    assert seeds(tier) == {2}


def test_pinned_chunks_stay_unless_told(tier: DiskTier) -> None:
    tier.pin(make_key(0))
    assert carry_out(tier, PruneRule()).chunks == 5
    assert seeds(tier) == {0}
    assert carry_out(tier, PruneRule(pinned=True)).chunks == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda tier: tier.pin(make_key(0)),
        lambda tier: (tier.read(make_key(0)), tier.flush()),
        lambda tier: tier.write(make_chunk(0)),
    ],
    ids=["pinned", "used", "replaced"],
)
def test_what_changed_since_it_was_listed_stays(tier: DiskTier, change: Callable[[DiskTier], None]) -> None:
    listed = list(tier.records())
    with DiskTier(tier.root, min_free=0) as other:
        change(other)
    left = {record.info.key for record in tier.delete_unused(listed)}
    assert left == {record.info.key for record in listed} - {make_key(0)}
    assert seeds(tier) == {0}


def test_beside_a_process_that_writes(tier: DiskTier) -> None:
    with running(write_and_evict, tier.root, 100, 140, None) as process:
        started(tier.root, 100)
        left = 0
        while left < 50:
            left += carry_out(tier, PruneRule(max_size=10 * SIZE)).chunks
            assert process.is_alive()
        # Who is killed while it deletes may leave a row without its file.
        stopped(process, tier.root, 100)
    carry_out(tier, PruneRule(max_size=10 * SIZE))
    files = list((tier.root / "chunks").rglob("*.safetensors"))
    assert len(files) == tier.usage().chunks <= 10


def test_s3_goes_by_the_time_of_the_write(s3_endpoint: str) -> None:
    with S3Tier("pruning", endpoint=s3_endpoint) as tier:
        tier._client.create_bucket(Bucket="pruning")
        for seed in (0, 2, 4):
            tier.write(make_chunk(seed))
        assert plan(tier, PruneRule(unused_since=time.time_ns() - 10**12)).chunks == 0
        assert plan(tier, PruneRule(unused_since=time.time_ns() + 10**12)).chunks == 3
        assert carry_out(tier, PruneRule(max_size=SIZE)).chunks == 2
        assert tier.usage().chunks == 1


def test_daemon_with_several_tiers(tmp_path: Path) -> None:
    store = TieredStore([MemoryTier(1 << 20), DiskTier(tmp_path, min_free=0)])
    for seed in range(0, 8, 2):
        store.write(make_chunk(seed))
    store.persisted(make_key(6), 10)
    with serving(store) as port, RemoteTier("127.0.0.1", port) as tier:
        planned = plan(tier, PruneRule())
        assert carry_out(tier, PruneRule()) == planned
        assert list(tier.keys()) == []
        assert store.tiers[1].usage().chunks == 0
