"""The catalog: the ledger over SQL, totals, transactions, damage, read-only opening."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droidspeak.errors import TierUnavailable
from droidspeak.storage.catalog import Catalog, PendingWrite
from droidspeak.storage.eviction import LRU, S3FIFO, Entry, EvictionPolicy, Ledger, MemoryLedger
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.selection import Selection
from droidspeak.storage.testing import make_key
from droidspeak.storage.tier import ChunkInfo, SlotBytes, TierUsage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    catalog = opened(path)
    yield catalog
    catalog.close()


def opened(path: Path, **options) -> Catalog:
    catalog = Catalog(path, **options)
    if catalog.fresh:
        with catalog.transaction():
            pass
    return catalog


def admit(catalog: Catalog, key: ChunkKey, nbytes: int = 10, e_layers: tuple[int, ...] = ()) -> ChunkInfo:
    info = ChunkInfo(key, 16, nbytes, e_layers, "raw")
    LRU().admit(catalog, key, nbytes)
    catalog.describe(info, 7, created=1)
    return info


# The ledger

_STEPS = st.lists(
    st.tuples(st.sampled_from(["admit", "touch", "pin", "unpin", "remove", "evict"]), st.integers(0, 7)),
    max_size=60,
)


def play(
    policy: EvictionPolicy, ledger: Catalog | MemoryLedger, steps: list[tuple[str, int]]
) -> list[object]:
    seen: list[object] = []
    for step, seed in steps:
        key = make_key(seed, source=seed % 2)
        known = ledger.get(key)
        if step == "admit":
            policy.admit(ledger, key, 10 + seed)
        elif step == "touch":
            policy.touch(ledger, key)
        elif step == "evict":
            victim = policy.victim(ledger)
            seen.append(victim)
            if victim:
                ledger.remove(victim.key)
        elif known and step == "remove":
            ledger.remove(key)
        elif known:
            ledger.set_pinned(key, step == "pin")
        seen.append((known, ledger.nbytes(), ledger.nbytes("main"), ledger.nbytes("small")))
    return seen


@pytest.mark.parametrize("policy", [LRU(), S3FIFO()], ids=lambda policy: policy.name)
@given(steps=_STEPS)
@settings(max_examples=40, deadline=None)
def test_evicts_as_the_ledger_in_memory_does(tmp_path_factory, policy, steps):
    catalog = opened(tmp_path_factory.mktemp("catalog") / "catalog.sqlite")
    with catalog.transaction():
        assert play(policy, catalog, steps) == play(policy, MemoryLedger(), steps)
    held = len(list(catalog.keys()))
    assert catalog.usage() == TierUsage(held, catalog.nbytes())
    catalog.close()


@pytest.mark.parametrize("make", [lambda path: opened(path, max_ghosts=2), lambda _: MemoryLedger(2)])
def test_ghosts_are_bounded(path, make):
    ledger: Ledger = make(path)
    for seed in range(3):
        ledger.remember_ghost(make_key(seed))
    assert [ledger.forget_ghost(make_key(seed)) for seed in (0, 1, 2, 2)] == [False, True, True, False]
    if isinstance(ledger, Catalog):
        ledger.close()


def test_order_does_not_follow_a_clock_that_goes_back(catalog, monkeypatch):
    for tick, seed in zip((100, 50, 10), range(3), strict=True):
        monkeypatch.setattr(time, "time_ns", lambda tick=tick: tick)
        catalog.put(Entry(make_key(seed), 1))
    for seed in range(3):
        oldest = catalog.oldest("main")
        assert oldest.key == make_key(seed)
        catalog.remove(oldest.key)


# Questions


def test_leading_over_many_batches(catalog):
    keys = [make_key(seed) for seed in range(1_300)]
    with catalog.transaction():
        infos = [admit(catalog, key, e_layers=(3, 5)[: seed % 3]) for seed, key in enumerate(keys)]
        catalog.remove(keys[1_200])
    assert catalog.leading(keys) == infos[:1_200]
    assert catalog.leading([keys[3], keys[3], keys[2]]) == [infos[3], infos[3], infos[2]]
    assert catalog.leading(keys[1_200:]) == catalog.leading([]) == []
    assert list(catalog.keys()) == sorted(set(keys) - {keys[1_200]})


def test_totals_per_source(catalog):
    with catalog.transaction():
        for seed in range(6):
            admit(catalog, make_key(seed, source=seed % 2), nbytes=10 + seed)
        catalog.remove(make_key(0))
    assert catalog.usage() == TierUsage(5, 65)
    assert catalog.sources() == {
        make_key(0).source: TierUsage(2, 26),
        make_key(0, source=1).source: TierUsage(3, 39),
    }


def test_questions_cost_the_same_on_a_large_catalog(catalog):
    """No plan may scan the chunks: that is what keeps a million of them cheap."""
    questions = [
        "SELECT key FROM chunks WHERE queue = 'main' AND pinned = 0 ORDER BY place LIMIT 1",
        "SELECT key FROM chunks WHERE key > 'a' ORDER BY key LIMIT 1000",
        "SELECT key FROM chunks WHERE key IN ('a', 'b')",
    ]
    for question in questions:
        plan = catalog._ask(f"EXPLAIN QUERY PLAN {question}")
        assert all("SEARCH" in detail and "SCAN" not in detail for *_, detail in plan), plan


def test_writes_under_way_are_reserved_and_what_they_replace_is_not_counted_twice(catalog):
    with catalog.transaction():
        admit(catalog, make_key(0), 100)
        admit(catalog, make_key(1), 100)
        replacing = PendingWrite("a.tmp", make_key(0), 70, "1-a")
        catalog.begin_write(replacing)
        assert catalog.committed() == 170
        catalog.begin_write(PendingWrite("b.tmp", make_key(2), 30, "1-a"))
        assert catalog.committed() == 200
        catalog.end_write(replacing)
        assert catalog.committed() == 230
    assert catalog.usage() == TierUsage(2, 200)


# Transactions


def test_a_failed_transaction_leaves_nothing(catalog):
    def fail() -> None:
        with catalog.transaction():
            admit(catalog, make_key(0))
            with catalog.renewed():
                admit(catalog, make_key(1))
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert catalog.usage() == TierUsage(0, 0)
    with catalog.transaction():
        admit(catalog, make_key(0))
    assert catalog.find(make_key(0)).header_bytes == 7


def test_questions_do_not_wait_for_a_change(catalog):
    with catalog.transaction():
        admit(catalog, make_key(0))
        answers: list[object] = []
        asking = threading.Thread(target=lambda: answers.append(catalog.find(make_key(0))))
        asking.start()
        asking.join(5)
        assert answers == [None]


def test_another_writer_waits_and_then_gives_up_in_one_line(catalog, path, monkeypatch):
    monkeypatch.setattr("droidspeak.storage.catalogfile._BUSY_SECONDS", 0.05)
    other = opened(path)
    with catalog.transaction(), pytest.raises(TierUnavailable, match=r"catalog\.sqlite: .*locked"):
        other.put(Entry(make_key(0), 1))
    other.put(Entry(make_key(0), 1))
    assert catalog.find(make_key(0))
    other.close()


# Damage


def damaged_by(path: Path, how: str) -> None:
    if how == "garbage":
        path.write_bytes(os.urandom(5_000))
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "foreign":
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE songs (name)")
        connection.close()
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.close()


@pytest.mark.parametrize("how", ["garbage", "cut", "foreign", "other version"])
def test_a_catalog_that_cannot_be_used_is_moved_aside(path, how):
    first = opened(path)
    with first.transaction():
        for seed in range(200):
            admit(first, make_key(seed))
    first.close()
    damaged_by(path, how)
    catalog = Catalog(path)
    assert catalog.fresh
    with catalog.transaction():
        admit(catalog, make_key(0))
    assert catalog.usage().chunks == 1
    assert path.with_suffix(".broken").exists()
    catalog.close()


def test_damage_met_while_open_is_one_failure_and_heals_at_the_next_open(path):
    catalog = opened(path)
    with catalog.transaction():
        for seed in range(200):
            admit(catalog, make_key(seed))
    catalog.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    catalog = opened(path)
    with pytest.raises(TierUnavailable):
        catalog.find(make_key(0))
    catalog.close()
    healed = Catalog(path)
    assert healed.fresh
    healed.close()


def test_a_first_open_that_was_cut_short_is_done_again(path):
    with pytest.raises(KeyError):
        _interrupted(path)
    catalog = Catalog(path)
    assert catalog.fresh
    catalog.close()


def _interrupted(path: Path) -> None:
    catalog = Catalog(path)
    try:
        with catalog.transaction():
            raise KeyError
    finally:
        catalog.close()


# Read-only


def test_read_only_writes_nothing(path):
    catalog = opened(path)
    with catalog.transaction():
        info = admit(catalog, make_key(0))
    catalog.close()
    before = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    catalog = Catalog(path, read_only=True)
    assert catalog.find(make_key(0)).info == info
    with pytest.raises(TierUnavailable):
        catalog.remove(make_key(0))
    catalog.close()
    assert {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


def test_read_only_sees_a_store_that_is_being_written(catalog, path):
    reader = Catalog(path, read_only=True)
    with catalog.transaction():
        admit(catalog, make_key(0))
    assert reader.find(make_key(0))
    reader.close()


@pytest.mark.parametrize("content", [None, b"", b"not a database, but long enough to be read as one" * 100])
def test_read_only_without_a_catalog(path, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TierUnavailable, match=r"catalog\.sqlite"):
        Catalog(path, read_only=True)


def test_after_close_it_is_unavailable(catalog):
    catalog.close()
    catalog.close()
    with pytest.raises(TierUnavailable):
        catalog.usage()


# Older versions


def older(path: Path) -> list[tuple]:
    """Makes the catalog at `path` one of version 1; its rows."""
    columns = "key, nbytes, queue, place, hits, pinned, tokens, header_bytes, e_layers, codec, created, used"
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("DROP INDEX pinned")
        for column in ("salt", "k_bytes", "v_bytes", "e_bytes"):
            connection.execute(f"ALTER TABLE chunks DROP COLUMN {column}")
        connection.execute("PRAGMA user_version = 1")
        rows = connection.execute(f"SELECT {columns} FROM chunks ORDER BY key").fetchall()
    connection.close()
    return rows


def test_an_older_version_is_brought_up_to_date_and_nothing_is_lost(path):
    catalog = opened(path)
    with catalog.transaction():
        infos = [admit(catalog, make_key(seed), nbytes=10 + seed, e_layers=(1,)) for seed in range(3)]
        catalog.set_pinned(make_key(2), True)
        catalog.set_hits(make_key(1), 5)
    catalog.close()
    rows = older(path)
    with pytest.raises(TierUnavailable, match="open the folder once for writing"):
        Catalog(path, read_only=True)
    catalog = Catalog(path)
    assert not catalog.fresh
    assert catalog.leading([info.key for info in infos]) == infos
    assert catalog.find(make_key(0)).info.slots is None
    assert catalog.get(make_key(1)).hits == 5
    assert catalog.usage().pinned == 12
    with catalog.transaction():
        info = replace(infos[0], salt="a" * 16, slots=SlotBytes(1, 2, 3))
        catalog.describe(info, 7, created=1)
    assert catalog.find(make_key(0)).info.slots == SlotBytes(1, 2, 3)
    assert catalog.find(make_key(0)).info.salt == "a" * 16
    catalog.close()
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT key, hits, pinned FROM chunks ORDER BY key").fetchall()
    connection.close()
    assert found == [(row[0], row[4], row[5]) for row in rows]


def test_an_older_release_goes_on_beside_it(path):
    opened(path).close()
    older(path)
    before = sqlite3.connect(path, isolation_level=None)
    before.execute("SELECT count(*) FROM chunks")
    catalog = Catalog(path)
    before.execute(
        "INSERT INTO chunks (key, nbytes, queue, place, hits, pinned) VALUES (?, 7, 'main', 1, 0, 0)",
        (str(make_key(0)),),
    )
    before.close()
    assert catalog.find(make_key(0)).info.nbytes == 7
    catalog.close()


def test_read_only_sees_what_others_write_after_it_was_opened(path):
    opened(path).close()
    reader = Catalog(path, read_only=True)
    writer = opened(path)
    with writer.transaction():
        admit(writer, make_key(0))
    assert reader.find(make_key(0))
    assert [record.info.key for record in reader.select(Selection(), "disk")] == [make_key(0)]
    assert [record.info.key for record in reader.select(Selection(sort="size"), "disk")] == [make_key(0)]
    with pytest.raises(TierUnavailable):
        reader.remove(make_key(0))
    writer.close()
    reader.close()


def test_pinned_bytes_cost_no_scan(catalog):
    with catalog.transaction():
        for seed in range(4):
            admit(catalog, make_key(seed), nbytes=10 + seed)
        catalog.set_pinned(make_key(1), True)
        catalog.set_pinned(make_key(2), True)
        catalog.set_pinned(make_key(1), False)
    assert catalog.usage().pinned == 12
    plan = catalog._ask("EXPLAIN QUERY PLAN SELECT total(nbytes) FROM chunks WHERE pinned = 1")
    assert "USING COVERING INDEX pinned" in plan[0][-1]
