"""Selections: one description, two readings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.storage.catalog import Catalog
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.eviction import Entry
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.selection import FIELDS, LISTED, Condition, Selection
from droidspeak.storage.testing import make_chunk
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes

DIGITS = "01f"
NUMBERS = st.integers(0, 3)


def digest(text: str) -> str:
    return (text * 64)[:64]


BEGINNINGS = st.text(DIGITS, min_size=1, max_size=3)
RECORDS = st.builds(
    lambda source, shard, prefix, tokens, nbytes, e_layers, codec, salt, *rest: ChunkRecord(
        ChunkInfo(
            ChunkKey(SourceId(digest(source)), shard, digest(prefix)),
            tokens,
            nbytes,
            tuple(sorted(e_layers)),
            codec,
            "disk",
            salt,
            SlotBytes(nbytes, 0, 0),
        ),
        *rest,
    ),
    BEGINNINGS,
    st.sampled_from(["0of1", "1of2", "0012of1024"]),
    BEGINNINGS,
    NUMBERS,
    NUMBERS,
    st.sets(st.sampled_from([0, 1, 3, 11, 13, 31])),
    st.sampled_from(["raw", "zstd"]),
    st.sampled_from(["", "a" * 16]),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.booleans(),
)


VALUES = {
    "number": NUMBERS,
    "layers": st.sampled_from([0, 1, 3, 11, 13, 31, 113]),
    "text": st.sampled_from(["", "a" * 16, "raw", "zstd", "0of1", "1of2", "0012of1024", "0012", "disk"]),
    "begins": st.lists(BEGINNINGS, max_size=2).map(tuple),
}


def conditions_on(field: str) -> st.SearchStrategy[Condition]:
    known = FIELDS[field]
    return st.builds(Condition, st.just(field), st.sampled_from(known.operators), VALUES[known.kind])


CONDITIONS = st.sampled_from(list(FIELDS)).flatmap(conditions_on)
SELECTIONS = st.builds(
    Selection,
    st.lists(CONDITIONS, max_size=3).map(tuple),
    st.sampled_from([None, *sorted(set(FIELDS) - {"e"})]),
    st.booleans(),
    st.none() | st.integers(0, 5),
)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path_factory.mktemp("catalog") / "catalog.sqlite")
    with catalog.transaction():
        pass
    yield catalog
    catalog.close()


def fill(catalog: Catalog, records: list[ChunkRecord]) -> None:
    with catalog.transaction(), catalog.renewed():
        pass
    with catalog.transaction():
        for record in records:
            info = record.info
            catalog.put(Entry(info.key, info.nbytes, hits=record.hits or 0, pinned=bool(record.pinned)))
            catalog.describe(info, 0, record.created or 0)
            catalog.set_used(info.key, record.used or 0)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS, max_size=12, unique_by=lambda record: str(record.info.key)), data=st.data())
def test_sql_and_python_agree(catalog, records, data):
    fill(catalog, records)
    for _ in range(8):
        selection = data.draw(SELECTIONS)
        in_sql = list(catalog.select(selection, "disk"))
        # Without an order, which ones a limit leaves is the tier's affair; a catalog takes them by key.
        by_key = sorted(records, key=lambda record: str(record.info.key))
        assert in_sql == list(selection.of(by_key))


@pytest.mark.parametrize("field", FIELDS)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(RECORDS, min_size=4, max_size=12, unique_by=lambda r: str(r.info.key)), data=st.data()
)
def test_every_condition_reads_alike(catalog, field, records, data):
    fill(catalog, records)
    for _ in range(8):
        condition = data.draw(conditions_on(field))
        in_sql = {record.info.key for record in catalog.select(Selection((condition,)), "disk")}
        assert in_sql == {record.info.key for record in records if condition.matches(record)}


@given(
    records=st.lists(RECORDS, max_size=12, unique_by=lambda record: str(record.info.key)),
    selection=SELECTIONS,
)
def test_what_is_looked_at_in_two_steps_is_the_same(records, selection):
    early, late = selection.split(LISTED)
    assert list(late.of(early.of(records))) == list(selection.of(records))
    assert not {condition.field for condition in early.conditions} - LISTED


@given(
    parts=st.lists(st.lists(RECORDS, max_size=5), max_size=3),
    selection=SELECTIONS,
)
def test_parts_merge_into_one_order(parts, selection):
    merged = selection.merge([selection.of(part) for part in parts])
    whole = list(selection.of([record for part in parts for record in part]))
    ranks = [selection.rank(record) for record in merged]
    if selection.sort is None:
        assert len(ranks) == len(whole)
    else:
        assert ranks == [selection.rank(record) for record in whole]


def test_what_a_tier_does_not_know_meets_no_condition_and_stands_last():
    known = ChunkRecord(ChunkInfo(ChunkKey(SourceId(digest("a")), "0of1", digest("b")), 1, 1, ()), hits=3)
    unknown = ChunkRecord(ChunkInfo(ChunkKey(SourceId(digest("a")), "0of1", digest("a")), 1, 1, ()))
    for operator in FIELDS["hits"].operators:
        assert not Condition("hits", operator, 3).matches(unknown)
    for descending in (True, False):
        assert list(Selection((), "hits", descending).of([unknown, known])) == [known, unknown]


@pytest.mark.parametrize(
    ("field", "operator", "value", "told"),
    [
        ("weight", "=", 1, "no field 'weight'; allowed: source, shard"),
        ("codec", "<", "raw", "codec<: allowed are = !="),
        ("size", "=", "1", "'1' is no value"),
        ("size", "=", 2**63, "is no value"),
        ("source", "=", "ab", "'ab' is no value"),
    ],
)
def test_conditions_that_there_are_not(field, operator, value, told):
    with pytest.raises(UsageError, match=told):
        Condition(field, operator, value)


def test_no_order_by_a_set_of_layers():
    with pytest.raises(UsageError, match="no order by 'e'; allowed: codec, created"):
        Selection(sort="e")


def test_pages_while_chunks_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("droidspeak.storage.catalog._PAGE", 4)
    with DiskTier(tmp_path, min_free=0) as tier:
        chunks = [make_chunk(seed, layers=1 + seed % 3) for seed in range(15)]
        for chunk in chunks:
            tier.write(chunk)
        for selection in (Selection(), Selection(sort="size", descending=True), Selection(limit=7)):
            listing = tier.select(selection)
            first = next(listing)
            # A listing that is read slowly holds nobody up, and no snapshot.
            tier.delete(first.info.key)
            tier.write(make_chunk(0, key=first.info.key, layers=2))
            rest = [record.info.key for record in listing]
            assert len({first.info.key, *rest}) == len(rest) + 1 == (selection.limit or 15)
