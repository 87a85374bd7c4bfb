"""The list of a copy or an export: each chunk once, of the tier that is asked first, and out of memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from droidspeak.errors import StorageError, TierUnavailable
from droidspeak.storage.chunklist import ChunkList
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.testing import make_chunk, make_key
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, Tier

ALL = Selection()


class Listing(MemoryTier):
    """A tier that lists so many chunks, which are not there."""

    def __init__(self, count: int, *, breaks: bool = False) -> None:
        super().__init__(1 << 20)
        self._count, self._breaks = count, breaks

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        blank = ChunkInfo(make_key(0), 16, 100, ())
        for number in range(self._count):
            key = ChunkKey(blank.key.source, "0of1", f"{number:064x}")
            yield ChunkRecord(replace(blank, key=key))
        if self._breaks:
            raise TierUnavailable("unplugged")


def filled(*seeds: int, tokens: int = 16) -> Tier:
    tier = MemoryTier(1 << 20)
    for seed in seeds:
        tier.write(make_chunk(seed, tokens=tokens))
    return tier


def test_each_chunk_once_of_the_first_tier_that_has_it() -> None:
    fast, slow = filled(1, 2), filled(2, 3, tokens=32)
    with ChunkList([fast, slow], ALL) as chunks:
        rows = list(chunks)
        assert len(chunks) == 3
        assert chunks.nbytes == sum(nbytes for _, _, nbytes in rows)
        assert {(key, tier) for tier, key, _ in rows} == {
            (make_key(1), fast),
            (make_key(2), fast),
            (make_key(3), slow),
        }
        assert [key for _, key, _ in rows] == sorted(key for _, key, _ in rows)


def test_of_a_tier_that_is_asked_first_only_what_is_selected() -> None:
    fast, slow = filled(1, 2), filled(2, 3, tokens=32)
    with ChunkList([fast, slow], Selection((Condition("tokens", ">", 16),))) as chunks:
        assert {(key, tier) for tier, key, _ in chunks} == {(make_key(2), slow), (make_key(3), slow)}


def test_find_and_discard() -> None:
    tier = filled(1, 2)
    with ChunkList([tier], ALL) as chunks:
        assert chunks.find(make_key(1)) == (tier, make_key(1), make_chunk(1).header.nbytes)
        assert chunks.find(make_key(3)) is None
        assert chunks.discard(make_key(1))
        assert not chunks.discard(make_key(1))
        assert [key for _, key, _ in chunks] == [make_key(2)]


def test_nothing() -> None:
    with ChunkList([filled()], ALL) as chunks:
        assert (list(chunks), len(chunks), chunks.nbytes) == ([], 0, 0)


def test_what_changes_later_is_not_in_it() -> None:
    tier = filled(1, 2)
    with ChunkList([tier], ALL) as chunks:
        tier.delete(make_key(1))
        tier.write(make_chunk(3))
        assert {key for _, key, _ in chunks} == {make_key(1), make_key(2)}


def test_a_tier_that_fails_fails() -> None:
    with pytest.raises(TierUnavailable, match="unplugged"):
        ChunkList([Listing(10, breaks=True)], ALL)


def test_many_chunks_are_not_in_memory() -> None:
    tracemalloc.start()
    try:
        with ChunkList([Listing(20_000)], ALL) as chunks:
            assert sum(1 for _ in chunks) == 20_000
        # The keys alone, as texts, are 4 MiB.
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_no_room_for_the_list_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    connect = sqlite3.connect

    def small(_name: str, **options: object) -> sqlite3.Connection:
        rows = connect(tmp_path / "list", **options)  # type: ignore[call-overload]
        rows.execute("PRAGMA max_page_count = 10")
        return rows

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(StorageError, match="temporary file: database or disk is full"):
        ChunkList([Listing(10_000)], ALL)
