"""Chunks over HTTP: bytes, ranges, validators, changes, lookups, and every error that a store may give."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droidspeak.errors import TierTimeout, TierUnavailable
from droidspeak.integrations.server.objects import key_of
from droidspeak.storage import Chunk, ChunkInfo, Slot, SlotKind
from droidspeak.storage.objects import object_chunk
from droidspeak.storage.testing import make_chunk, make_key
from droidspeak.storage.wrappers import FaultyTier, ReadOnlyTier, fail

from .httpclient import MIB, Answer, Serving, disk, lines_of, memory, path_of, serving, store_of
from .wireclient import wait_until

BIG = make_chunk(1, layers=6, e_layers=(2, 4), tokens=32)
DATA = BIG.to_bytes()
ETAG = f'"{BIG.header.digest}"'


@pytest.fixture
def served(tmp_path) -> Iterator[Serving]:
    """Memory over disk."""
    with serving(store_of(memory(), disk(tmp_path / "store"))) as served:
        yield served


@pytest.fixture
def on_disk(tmp_path) -> Iterator[Serving]:
    with serving(store_of(disk(tmp_path / "store"))) as served:
        yield served


@pytest.fixture(scope="module")
def holding(tmp_path_factory) -> Iterator[Serving]:
    """A disk that holds `BIG`."""
    with serving(store_of(disk(tmp_path_factory.mktemp("holding") / "store"))) as served:
        served.client.put(BIG)
        assert served.store.flush()
        yield served


def get(served: Serving, chunk: Chunk = BIG, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return served.client.ask("GET", path_of(chunk.key), headers=named)


def file_of(served: Serving, folder: Path, chunk: Chunk) -> Path:
    assert served.store.flush()
    return next(folder.rglob(f"{chunk.key.prefix}*"))


def flip(path: Path, offset: int) -> None:
    """One bit of a stored chunk; the file stays as long as it is."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# GET, HEAD


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_chunk_comes_back_byte_for_byte(served, codec):
    chunk = make_chunk(3, layers=3, e_layers=(0, 2), codec=codec)
    served.client.put(chunk)
    for _tier in ("memory", "disk"):
        answer = get(served, chunk)
        assert (answer.status, answer.body) == (200, chunk.to_bytes())
        assert served.store.flush()
        served.store.evict_from("cpu", MIB)
    described = {
        "ETag": f'"{chunk.header.digest}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Length": str(chunk.header.nbytes),
        "X-Droidspeak-Header-Bytes": str(chunk.header.data_start),
        "X-Droidspeak-Tokens": "16",
        "X-Droidspeak-E-Layers": "0,2",
        "X-Droidspeak-Codec": codec,
    }
    assert {name: answer.headers[name] for name in described} == described
    head = served.client.ask("HEAD", path_of(chunk.key))
    assert (head.status, head.body) == (200, b"")
    assert {name: head.headers[name] for name in described} == described


def test_what_is_not_held_is_not_found(served):
    path = path_of(make_key(9))
    for method, rest in [
        ("GET", ""),
        ("DELETE", ""),
        ("PUT", "/pin"),
        ("DELETE", "/pin"),
        ("POST", "/verify"),
    ]:
        assert served.client.ask(method, path + rest).refusal == (404, "not_found")
    assert served.client.ask("HEAD", path).status == 404


# Ranges


@st.composite
def ranges(draw: Any) -> tuple[str, slice]:
    """A satisfiable `Range` over `DATA`, and the slice that it stands for."""
    size = len(DATA)
    first = draw(st.integers(0, size - 1))
    match draw(st.sampled_from(["closed", "open", "suffix"])):
        case "closed":
            last = draw(st.integers(first, 2 * size))
            return f"bytes={first}-{last}", slice(first, last + 1)
        case "open":
            return f"bytes={first}-", slice(first, size)
    count = draw(st.integers(1, 2 * size))
    return f"bytes=-{count}", slice(max(0, size - count), size)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(asked=ranges())
def test_any_range_gives_the_containers_own_bytes(holding, asked):
    text, meant = asked
    answer = get(holding, Range=text)
    assert (answer.status, answer.body) == (206, DATA[meant])
    last = meant.start + len(answer.body) - 1
    assert answer.headers["Content-Range"] == f"bytes {meant.start}-{last}/{len(DATA)}"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["ETag"] == ETAG


@pytest.mark.parametrize(
    "text",
    [
        f"bytes={len(DATA)}-",
        "bytes=-0",
        "bytes=5-4",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "bytes=0-1,4-5",
        "bytes=--5",
        "bytes=0x1-2",
        f"bytes={'9' * 41}-",
        "bytes=1-2-3",
    ],
)
def test_a_range_that_cannot_be_given(holding, text):
    answer = get(holding, Range=text)
    assert answer.refusal == (416, "bad_range")
    assert answer.headers["Content-Range"] == f"bytes */{len(DATA)}"


@pytest.mark.parametrize("text", ["layers=1-2", "none", "bytes"])
def test_an_unknown_unit_is_ignored(holding, text):
    answer = get(holding, Range=text)
    assert (answer.status == 200) == (text != "bytes")


def test_only_the_slots_that_a_range_touches_are_read(on_disk, tmp_path):
    on_disk.client.put(BIG)
    start = BIG.header.data_start
    damaged = BIG.header.records[Slot(SlotKind.V, 3)]
    flip(file_of(on_disk, tmp_path, BIG), start + damaged.start)
    begin, end = start + damaged.start, start + damaged.end
    for text, meant in [(f"bytes=0-{begin - 1}", slice(begin)), (f"bytes={end}-", slice(end, None))]:
        answer = get(on_disk, Range=text)
        assert (answer.status, answer.body) == (206, DATA[meant])
    assert get(on_disk, Range=f"bytes={end - 1}-").refusal == (404, "corrupt")
    # Quarantined: it is not found from now on.
    assert get(on_disk).refusal == (404, "not_found")


# Validators


@pytest.mark.parametrize("condition", [ETAG, "*", f'"x", {ETAG}'])
def test_if_match_of_this_content(holding, condition):
    assert get(holding, If_Match=condition).body == DATA
    assert get(holding, If_Match=condition, Range="bytes=0-7").status == 206
    path = path_of(BIG.key)
    assert holding.client.ask("HEAD", path, headers={"If-Match": condition}).status == 200


@pytest.mark.parametrize("condition", ['"0123456789abcdef"', f"W/{ETAG}", "", ETAG[1:-1]])
def test_if_match_of_another_content(holding, condition):
    assert get(holding, If_Match=condition).refusal == (412, "changed")
    assert get(holding, If_Match=condition, Range="bytes=0-7").refusal == (412, "changed")


def test_if_range_gives_all_of_what_has_changed(holding):
    assert get(holding, If_Range=ETAG, Range="bytes=0-7").body == DATA[:8]
    answer = get(holding, If_Range='"another"', Range="bytes=0-7")
    assert (answer.status, answer.body) == (200, DATA)


def test_a_replaced_chunk_has_another_etag(served):
    first, second = make_chunk(1, key=make_key(5)), make_chunk(2, key=make_key(5))
    served.client.put(first)
    served.client.put(second)
    assert get(served, second).body == second.to_bytes()
    assert get(served, second, If_Match=f'"{first.header.digest}"').refusal == (412, "changed")


class Replaced(FaultyTier):
    """Another process replaces the chunk between two reads."""

    def read(self, key: Any, slots: Any = None, into: Any = None) -> Chunk | None:
        chunk = super().read(key, slots, into)
        if self.then:
            super().write(self.then.pop(0))
        return chunk

    then: list[Chunk]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_chunk_that_is_replaced_while_it_is_read(tmp_path, layers):
    old, new = make_chunk(1, key=make_key(5)), make_chunk(2, key=make_key(5), layers=layers)
    tier = Replaced(disk(tmp_path / "store"), {})
    tier.then = []
    with serving(store_of(tier)) as served:
        served.client.put(old)
        assert served.store.flush()
        tier.then = [new]
        answer = get(served, old, Range="bytes=0-")
        assert (answer.status, answer.body) == (206, new.to_bytes())
        tier.then = [old]
        assert get(served, old, If_Match=f'"{new.header.digest}"').refusal == (412, "changed")
        tier.then = [new, old, new, old]
        assert get(served, old).refusal == (503, "unavailable")


# PUT


def broken_containers() -> dict[str, bytes]:
    data, start = bytearray(DATA), BIG.header.data_start
    cases = {"empty": b"", "seven-bytes": DATA[:7], "garbage": os.urandom(4096), "cut": DATA[:-1]}
    cases |= {"longer": DATA + b"\0", "another-key": make_chunk(2).to_bytes()}
    for name, offset in [("length", 0), ("header", 40), ("first-slot", start), ("last-slot", len(DATA) - 1)]:
        cases[f"bit-in-{name}"] = bytes(data[:offset]) + bytes([data[offset] ^ 1]) + bytes(data[offset + 1 :])
    huge = (2**63).to_bytes(8, "little")
    return {**cases, "unbelievable-header": huge + DATA[8:]}


@pytest.mark.parametrize("case", list(broken_containers()))
def test_what_is_no_sound_container_of_the_key_is_refused(holding, case):
    answer = holding.client.ask("PUT", path_of(BIG.key), broken_containers()[case])
    assert answer.refusal == (422, "not_a_chunk")
    assert get(holding).body == DATA


def test_too_large(tmp_path):
    with serving(store_of(memory()), max_object=MIB, in_flight=MIB) as served:
        answer = served.client.ask("PUT", path_of(BIG.key), bytes(MIB + 1))
        assert answer.refusal == (413, "too_large")
        assert served.client.ask("PUT", path_of(BIG.key), bytes(MIB)).refusal == (422, "not_a_chunk")
        many = {"keys": [str(BIG.key)] * 9000}
        assert served.client.ask("POST", "/v1/leading", many).refusal == (413, "too_large")


def test_a_received_chunk_is_kept_without_a_copy(served):
    served.client.put(BIG)
    held = served.store.tiers[0].read(BIG.key)
    storages = {stored.untyped_storage().data_ptr() for stored in held.payload.values()}
    assert len(storages) == 1
    assert served.store.tiers[0].usage().nbytes == len(DATA)


# DELETE, pins, verify, quarantine, evict


def test_delete(served):
    served.client.put(BIG)
    assert served.client.ask("DELETE", path_of(BIG.key)).status == 204
    assert get(served).refusal == (404, "not_found")
    assert not list(served.store.keys())


def test_pinned_chunks_survive_an_eviction(served):
    kept, other = make_chunk(1), make_chunk(2)
    for chunk in (kept, other):
        served.client.put(chunk)
    assert served.client.ask("PUT", path_of(kept.key) + "/pin").status == 204
    freed = served.client.ask("POST", "/v1/evict", {"tier": "disk", "nbytes": 2**40})
    assert freed.json == {"freed": other.header.nbytes}
    served.client.ask("POST", "/v1/evict", {"tier": "cpu", "nbytes": 2**40})
    assert [get(served, chunk).status for chunk in (kept, other)] == [200, 404]
    assert served.client.ask("DELETE", path_of(kept.key) + "/pin").status == 204
    freed = served.client.ask("POST", "/v1/evict", {"tier": "disk", "nbytes": 1})
    assert freed.json == {"freed": kept.header.nbytes}


def test_evicting_from_a_tier_that_is_not_there(served):
    answer = served.client.ask("POST", "/v1/evict", {"tier": "tape", "nbytes": 1})
    assert answer.refusal == (400, "bad_request")
    assert "cpu, disk" in answer.json["error"]["message"]


def test_verify_reads_every_tiers_copy(served, tmp_path):
    served.client.put(BIG)
    path = path_of(BIG.key) + "/verify"
    assert served.client.ask("POST", path).json == {"ok": True, "found": None}
    flip(file_of(served, tmp_path, BIG), len(DATA) - 1)
    found = served.client.ask("POST", path).json
    assert not found["ok"]
    assert found["found"].startswith("tier disk: ")
    assert "v.5" in found["found"]
    # It only looks: the sound copy in memory still serves.
    assert get(served).body == DATA
    served.store.tiers[0].read(BIG.key).payload[Slot(SlotKind.K, 0)][0] ^= 1
    assert served.client.ask("POST", path).json["found"].startswith("tier cpu: ")
    assert served.client.ask("POST", path_of(BIG.key) + "/quarantine").status == 204
    assert get(served).refusal == (404, "not_found")


# Lookups


def test_leading_stops_at_the_first_gap(served):
    chunks = [make_chunk(seed) for seed in range(4)]
    for chunk in (*chunks[:2], chunks[3]):
        served.client.put(chunk)
    assert served.store.flush()
    asked = {"keys": [str(chunk.key) for chunk in chunks]}
    found = served.client.ask("POST", "/v1/leading", asked).json["chunks"]
    expected = ChunkInfo.of(chunks[0])
    assert [row["key"] for row in found] == asked["keys"][:2]
    assert found[0] == {
        "key": str(expected.key),
        "tokens": 16,
        "nbytes": expected.nbytes,
        "e_layers": [1],
        "codec": "raw",
        "tier": "cpu",
        "salt": "",
        "slots": make_chunk(0).header.slot_bytes._asdict(),
        **dict.fromkeys(("created", "used", "hits", "pinned")),
    }
    assert served.client.ask("POST", "/v1/leading", {"keys": []}).json == {"chunks": []}


def test_listing(served):
    chunks = [make_chunk(seed, key=make_key(seed, source=seed % 2)) for seed in range(600)]
    for chunk in chunks:
        served.store.write(chunk)
    every = {str(chunk.key) for chunk in chunks}
    rows = lines_of(served.client.ask("GET", "/v1/chunks"))
    assert {row["key"] for row in rows} == every
    assert {row["nbytes"] for row in rows} == {chunks[0].header.nbytes}
    bare = lines_of(served.client.ask("GET", "/v1/chunks?detail=false"))
    assert {row.pop("key") for row in bare} == every
    assert not any(bare)
    source = chunks[1].key.source
    of_source = lines_of(served.client.ask("GET", f"/v1/chunks?source={source}&detail=false"))
    assert {row["key"] for row in of_source} == {str(chunk.key) for chunk in chunks[1::2]}
    assert len(lines_of(served.client.ask("GET", f"/v1/chunks?source={source}&limit=7"))) == 7


def test_an_empty_store_lists_nothing(served):
    assert lines_of(served.client.ask("GET", "/v1/chunks")) == []


def test_the_object_of_an_lmcache_name(served):
    name = "model@2@1@1f@bfloat16"
    chunk = object_chunk(key_of("", name.encode()), {0: torch.arange(64.0)}, labels={"name": name})
    served.client.put(chunk)
    found = served.client.ask("GET", "/v1/objects?name=model%402%401%401f%40bfloat16").json
    assert (found["key"], found["tokens"], found["nbytes"]) == (str(chunk.key), 0, chunk.header.nbytes)
    assert served.client.ask("GET", "/v1/objects?name=other").refusal == (404, "not_found")


def test_usage(served):
    served.client.put(BIG)
    assert served.store.flush()
    get(served)
    told = served.client.ask("GET", "/v1/usage").json
    row = {"answers": True, "chunks": 1, "nbytes": len(DATA), "pinned": 0}
    assert told["tenant"] == ""
    assert told["tiers"] == [
        {"name": "cpu", **row, "capacity": 64 * MIB},
        {"name": "disk", **row, "capacity": None},
    ]
    assert told["counters"]["hits"]["cpu"] == served.store.counters.get("hits", "cpu") > 0


# Tiers that fail

EVERY_CALL = ("head", "leading", "read", "write", "delete", "keys", "usage", "pin", "unpin")
EVERY_CALL += ("evict", "quarantine", "records")
KEY = path_of(BIG.key)
OF_A_STORE = [
    ("GET", KEY, None),
    ("DELETE", KEY, None),
    ("PUT", KEY + "/pin", None),
    ("DELETE", KEY + "/pin", None),
    ("POST", KEY + "/verify", None),
    ("POST", KEY + "/quarantine", None),
    ("GET", "/v1/chunks", None),
    ("GET", "/v1/objects?name=x", None),
    ("POST", "/v1/leading", {"keys": [str(BIG.key)]}),
    ("POST", "/v1/evict", {"tier": "disk", "nbytes": 1}),
]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TierUnavailable("unplugged"), (503, "unavailable")),
        (TierTimeout("slow"), (504, "timeout")),
    ],
    ids=["unavailable", "timeout"],
)
def test_a_tier_that_fails(tmp_path, error, expected):
    tier = FaultyTier(disk(tmp_path / "store"), {name: repeat(fail(error)) for name in EVERY_CALL})
    with serving(store_of(tier)) as served:
        for method, path, body in OF_A_STORE:
            answer = served.client.ask(method, path, body)
            # A store that none of its tiers answers is unavailable, however they fail.
            assert answer.refusal in (expected, (503, "unavailable")), path
            assert ("Retry-After" in answer.headers) == (answer.status == 503)
        assert get(served).refusal == expected
        assert served.client.ask("GET", "/v1/usage").refusal == (503, "unavailable")
        assert served.client.ask("GET", "/readyz").refusal == (503, "unavailable")
        assert served.client.ask("GET", "/healthz").json == {"status": "alive"}
        assert served.client.ask("GET", "/metrics").status == 200


def test_a_listing_that_fails_on_the_way_is_cut_short(tmp_path):
    class Breaking(FaultyTier):
        def keys(self) -> Iterator[Any]:
            yield from (make_key(seed) for seed in range(3000))
            raise TierUnavailable("unplugged")

    with serving(store_of(Breaking(disk(tmp_path / "store"), {}))) as served:
        with pytest.raises(Exception, match=r"(?i)incomplete|broken"):
            served.client.ask("GET", "/v1/chunks?detail=false")
        assert served.client.ask("GET", "/healthz").status == 200


def test_no_room(tmp_path):
    with serving(store_of(memory(capacity=4096))) as served:
        small = make_chunk(3, layers=1)
        served.client.put(small)
        assert served.client.ask("PUT", path_of(small.key) + "/pin").status == 204
        assert served.client.ask("PUT", path_of(BIG.key), DATA).refusal == (507, "full")
        assert get(served, small).body == small.to_bytes()


def test_a_read_only_tier(tmp_path):
    with serving(store_of(ReadOnlyTier(memory()))) as served:
        assert served.client.ask("PUT", path_of(BIG.key), DATA).refusal == (503, "unavailable")


def test_a_defect_is_told_without_its_details(tmp_path):
    broken = FaultyTier(memory(), {"leading": repeat(fail(RuntimeError("secret detail")))})
    with serving(store_of(broken)) as served:
        answer = served.client.ask("POST", "/v1/leading", {"keys": [str(BIG.key)]})
        assert answer.refusal == (500, "internal")
        assert b"secret" not in answer.body
        assert served.client.ask("GET", "/healthz").status == 200


# The budget


def test_too_many_bytes_under_way(served_hastily):
    served = served_hastily
    served.client.put(BIG)
    budget = served.state.budget
    budget.take(8 * MIB, 1)
    for answer in (
        get(served),
        served.client.ask("PUT", path_of(BIG.key), DATA),
        served.client.ask("POST", path_of(BIG.key) + "/verify"),
    ):
        assert answer.refusal == (503, "unavailable")
        assert answer.headers["Retry-After"] == "1"
    # What needs no payload goes on.
    assert get(served, Range=f"bytes=0-{BIG.header.data_start - 1}").status == 206
    budget.give_back(8 * MIB)
    assert get(served).body == DATA
    wait_until(lambda: budget.held == 0)


@pytest.fixture
def served_hastily() -> Iterator[Serving]:
    with serving(store_of(memory()), in_flight=8 * MIB, max_object=8 * MIB, stall_timeout=0.3) as served:
        yield served


def test_a_chunk_larger_than_the_whole_budget_is_sent(tmp_path):
    with serving(store_of(memory()), in_flight=4096, max_object=4096) as served:
        served.store.write(BIG)
        assert len(DATA) > 4096
        assert get(served).body == DATA
        wait_until(lambda: served.state.budget.held == 0)
