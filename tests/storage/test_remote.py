"""The remote tier against real daemons, and against servers that are none."""

from __future__ import annotations

import gc
import json
import multiprocessing
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from droidspeak.config import TlsSettings
from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    ConfigError,
    StorageError,
    TierFull,
    TierTimeout,
    TierUnavailable,
)
from droidspeak.storage import Limits, TieredStore, daemonclient, remote
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.remote import RemoteTier
from droidspeak.storage.testing import (
    TierConformance,
    TierStateMachine,
    assert_holds,
    make_chunk,
    make_key,
)
from droidspeak.storage.tier import ChunkInfo, Tier, TierUsage

from ..server.certificates import self_signed  # noqa: TID252 - tests are no package that could be named
from .daemons import answering, closed_port, raw_server, serving
from .gates import eventually

MIB = 1 << 20
HOST = "127.0.0.1"
TOKEN = "a-token-of-many-letters"
READER = "a-token-for-readers-only"
E1 = Slot(SlotKind.E, 1)
BAIT = make_chunk(1, layers=8, tokens=256)
"""Its header fits in the first request, its payload does not."""


class WritesThrough(TieredStore):
    """What is written is in all tiers on return, so that it can be looked at."""

    def write(self, chunk: Chunk) -> None:
        super().write(chunk)
        assert self.flush(30)


class OwnDaemon(RemoteTier):
    """A tier that stops its daemon when it is closed."""

    def __init__(self, store: TieredStore, **options: Any) -> None:
        self.store = store
        self._undo = ExitStack()
        port = self._undo.enter_context(serving(store))
        super().__init__(HOST, port, timeout=30, **options)

    def close(self) -> None:
        super().close()
        self._undo.close()


# Conformance


class OverDisk:
    persistent = True
    reads_ranges = True
    operations = 12

    def make_tier(self, place: Path, capacity: int | None = None) -> OwnDaemon:
        return OwnDaemon(WritesThrough([DiskTier(place, min_free=0)]))

    def path(self, tier: Any, key: ChunkKey) -> Path:
        path: Path = tier.store.tiers[0].tier.path(key)
        return path

    def get_bytes(self, tier: Tier, key: ChunkKey) -> bytes | None:
        path = self.path(tier, key)
        return path.read_bytes() if path.exists() else None

    def put_bytes(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        self.path(tier, key).write_bytes(data)

    def drop(self, tier: Tier, key: ChunkKey) -> None:
        self.path(tier, key).unlink()


class TestRemoteDisk(OverDisk, TierConformance):
    def test_many_threads_with_few_connections(self, tmp_path: Path) -> None:
        with OwnDaemon(WritesThrough([DiskTier(tmp_path, min_free=0)]), concurrency=2) as tier:
            self._storm(tier)


class OverMemory:
    bounded = True
    damageable = False
    operations = 20

    def make_tier(self, place: Path, capacity: int | None = None) -> OwnDaemon:
        return OwnDaemon(TieredStore([MemoryTier(capacity or MIB)]))

    def cost(self, chunk: Chunk) -> int:
        return MemoryTier(MIB).footprint(chunk)


class TestRemoteMemory(OverMemory, TierConformance):
    def get_bytes(self, tier: Any, key: ChunkKey) -> bytes | None:
        chunk = tier.store.read(key)
        return chunk and chunk.to_bytes()

    def put_bytes(self, tier: Any, key: ChunkKey, data: bytes) -> None:
        tier.store.write(Chunk.from_bytes(data, key))

    def drop(self, tier: Any, key: ChunkKey) -> None:
        tier.store.delete(key)


class DiskMachine(OverDisk, TierStateMachine):
    pass


class SmallMemoryMachine(OverMemory, TierStateMachine):
    capacity = 3 * make_chunk(0).header.nbytes


TestDiskMachine = DiskMachine.TestCase
TestSmallMemoryMachine = SmallMemoryMachine.TestCase
TestDiskMachine.settings = TestSmallMemoryMachine.settings = settings(
    max_examples=4, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


# What goes over the wire


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "disk", min_free=0)


@pytest.fixture
def port(disk: DiskTier) -> Iterator[int]:
    with serving(WritesThrough([disk])) as port:
        yield port


@pytest.fixture
def tier(port: int) -> Iterator[RemoteTier]:
    with RemoteTier(HOST, port, timeout=30) as tier:
        yield tier


@dataclass
class Wire:
    """A relay in front of a daemon that counts what it lets through, and cuts the next `cuts` answers."""

    port: int
    target: int
    requests: list[str] = field(default_factory=list)
    received: int = 0
    cuts: int = 0

    def relay(self, client: socket.socket) -> None:
        with socket.create_connection((HOST, self.target)) as daemon:
            upwards = threading.Thread(target=self._upwards, args=(client, daemon), daemon=True)
            upwards.start()
            while data := daemon.recv(1 << 16):
                if self.cuts and len(data) > ANSWER_HEADERS:
                    self.cuts -= 1
                    client.sendall(data[: len(data) // 2])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                self.received += len(data)
                client.sendall(data)

    def _upwards(self, client: socket.socket, daemon: socket.socket) -> None:
        try:
            while data := client.recv(1 << 16):
                found = re.findall(rb"^([A-Z]+) (/\S*) HTTP/1.1\r$", data, re.MULTILINE)
                self.requests += [f"{method.decode()} {path.decode()}" for method, path in found]
                daemon.sendall(data)
            daemon.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def reset(self) -> None:
        self.requests, self.received = [], 0


@pytest.fixture
def wire(port: int) -> Iterator[Wire]:
    wire = Wire(0, port)
    with raw_server(wire.relay) as wire.port:
        yield wire


@pytest.fixture
def watched(wire: Wire) -> Iterator[RemoteTier]:
    with RemoteTier(HOST, wire.port, timeout=30) as tier:
        yield tier


ANSWER_HEADERS = 1000
"""Bytes that the headers of one answer have at most."""


def test_one_layer_is_the_header_and_that_range_only(watched: RemoteTier, wire: Wire) -> None:
    watched.write(BAIT)
    wire.reset()
    layer = Slot.kv([3])
    nbytes = sum(BAIT.payload[slot].numel() for slot in layer)
    assert_holds(watched.read(BAIT.key, layer), BAIT, layer)
    assert wire.requests == [f"GET /v1/chunks/{BAIT.key}"] * 2
    needed = BAIT.header.data_start + nbytes
    assert needed <= wire.received <= needed + 2 * ANSWER_HEADERS
    wire.reset()
    assert_holds(watched.read(BAIT.key, [E1]), BAIT, [E1])
    assert wire.requests == [f"GET /v1/chunks/{BAIT.key}"]
    assert BAIT.payload[E1].numel() <= wire.received <= BAIT.payload[E1].numel() + ANSWER_HEADERS


def test_neighbours_share_a_request_up_to_the_best_size(watched: RemoteTier, wire: Wire) -> None:
    watched.write(BAIT)
    watched.read(BAIT.key, [])
    for slots, limit, requests in (
        (None, 8 * MIB, 1),
        (Slot.kv([0, 1, 4, 7]), 8 * MIB, 3),
        (Slot.kv(range(8)), 4 * BAIT.payload[Slot(SlotKind.K, 0)].numel(), 4),
    ):
        wire.reset()
        watched.best_read = limit  # type: ignore[misc]
        assert_holds(watched.read(BAIT.key, slots), BAIT, slots)
        assert len(wire.requests) == requests


def test_a_header_as_long_as_the_last_one_takes_one_request(
    port: int, watched: RemoteTier, wire: Wire
) -> None:
    short = [make_chunk(seed, layers=1) for seed in range(2, 4)]
    long = [make_chunk(seed, layers=120) for seed in range(4, 6)]
    with RemoteTier(HOST, port) as other:
        for chunk in (*short, *long):
            other.write(chunk)
    for chunk, requests in zip((*short, *long, *short), (2, 1, 2, 1, 0, 0), strict=True):
        wire.reset()
        assert_holds(watched.read(chunk.key, Slot.kv([0])), chunk, Slot.kv([0]))
        assert len(wire.requests) == requests + 1
    with RemoteTier(HOST, wire.port) as other:
        assert_holds(other.read(long[0].key), long[0])
        wire.reset()
        assert_holds(other.read(short[0].key), short[0])  # the guess reaches beyond the object's end
        assert len(wire.requests) == 2


def test_a_lookup_is_one_request_for_4096_keys(watched: RemoteTier, wire: Wire) -> None:
    for seed in range(3):
        watched.write(make_chunk(seed))
    wire.reset()
    keys = [make_key(seed) for seed in range(3)]
    assert watched.leading([*keys, *map(make_key, range(10, 5000))]) == [
        ChunkInfo.of(make_chunk(seed)) for seed in range(3)
    ]
    assert watched.leading(keys * 1400) == [ChunkInfo.of(make_chunk(seed)) for seed in range(3)] * 1400
    assert watched.head(keys[0]) == ChunkInfo.of(make_chunk(0))
    assert wire.requests == ["POST /v1/leading"] * 4


def test_a_write_is_sent_as_it_lies(watched: RemoteTier, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    def joins(_chunk: Chunk) -> bytes:
        raise AssertionError("joined")

    monkeypatch.setattr(Chunk, "to_bytes", joins)
    watched.write(BAIT)
    assert wire.requests == [f"PUT /v1/chunks/{BAIT.key}"]
    assert_holds(watched.read(BAIT.key), BAIT)


def test_into_is_filled_without_a_copy(tier: RemoteTier) -> None:
    tier.write(BAIT)
    into = {slot: torch.zeros_like(BAIT.tensor(slot)) for slot in Slot.kv([0, 1])}
    got = tier.read(BAIT.key, into=into)
    assert got is not None
    assert_holds(got, BAIT)
    assert all(got.payload[slot].data_ptr() == tensor.data_ptr() for slot, tensor in into.items())


def test_objects_of_other_systems(tier: RemoteTier) -> None:
    from droidspeak.storage.objects import object_chunk, object_key, object_slot

    key = object_key("lmcache", "model", b"name")
    chunk = object_chunk(key, {0: torch.randn(3, 5), 1: torch.zeros(0)}, labels={"name": "x"})
    tier.write(chunk)
    assert_holds(tier.read(key), chunk)
    assert_holds(tier.read(key, [object_slot(1)]), chunk, [object_slot(1)])


# Chunks that change while they are known here


def test_a_replaced_chunk_is_read_anew(port: int, watched: RemoteTier, wire: Wire) -> None:
    old, new = make_chunk(1), make_chunk(2, key=make_key(1), layers=3, e_layers=(0, 1))
    watched.write(old)
    assert_holds(watched.read(old.key), old)
    with RemoteTier(HOST, port) as other:
        other.write(new)
    wire.reset()
    assert_holds(watched.read(old.key, Slot.kv([0])), new, Slot.kv([0]))
    assert len(wire.requests) == 4  # refused, header in two, range


def test_a_slot_that_an_older_version_lacked(port: int, tier: RemoteTier) -> None:
    old, new = make_chunk(1, e_layers=()), make_chunk(2, key=make_key(1))
    tier.write(old)
    assert_holds(tier.read(old.key), old)
    with RemoteTier(HOST, port) as other:
        other.write(new)
    assert_holds(tier.read(old.key, [E1]), new, [E1])
    with pytest.raises(ChunkIncomplete):
        tier.read(old.key, [Slot(SlotKind.E, 0)])


def test_a_chunk_replaced_in_the_middle_of_a_read_is_never_mixed(port: int, tier: RemoteTier) -> None:
    versions = [make_chunk(seed, key=make_key(0)) for seed in range(2)]
    tier.write(versions[0])
    find_header = tier._find_header
    other = RemoteTier(HOST, port)

    def and_replace(key: ChunkKey) -> Any:
        found = find_header(key)
        versions.reverse()
        other.write(versions[0])
        return found

    with other:
        tier._find_header = and_replace  # type: ignore[method-assign]
        assert tier.read(make_key(0)) is None  # replaced at each of both attempts
    tier._find_header = find_header  # type: ignore[method-assign]
    assert_holds(tier.read(make_key(0)), versions[0])


@pytest.mark.parametrize("slots", [None, [E1], []], ids=["all", "one", "none"])
def test_a_cached_header_is_no_false_hit(port: int, tier: RemoteTier, slots: list[Slot] | None) -> None:
    tier.write(make_chunk(1))
    assert_holds(tier.read(make_key(1)), make_chunk(1))
    with RemoteTier(HOST, port) as other:
        assert other.delete(make_key(1))
    assert tier.read(make_key(1), slots) is None


def test_damage_on_the_way_is_corrupt(tier: RemoteTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.write(BAIT)
    tier.read(BAIT.key, [])

    def and_flip(target: memoryview, answer: Any) -> None:
        daemonclient.fill(target, answer)
        target[-1] ^= 1

    monkeypatch.setattr(remote, "fill", and_flip)
    with pytest.raises(ChunkCorrupt, match="checksum"):
        tier.read(BAIT.key, Slot.kv([1, 5]))
    monkeypatch.undo()
    assert_holds(tier.read(BAIT.key), BAIT)


# A tier among others


def test_usage_and_eviction_of_a_daemon_with_two_tiers(disk: DiskTier) -> None:
    memory = MemoryTier(MIB)
    with serving(WritesThrough([memory, disk])) as port, RemoteTier(HOST, port) as tier:
        for seed in range(3):
            tier.write(make_chunk(seed))
        cost = memory.footprint(make_chunk(0)) + make_chunk(0).header.nbytes
        assert tier.usage() == TierUsage(3, 3 * cost, None)
        assert tier.evict(1) == cost
        assert tier.usage() == TierUsage(2, 2 * cost, None)
        assert tier.evict(0) == tier.evict(-1) == 0
        assert tier.usage().chunks == 2


def test_long_listings_are_streamed(disk: DiskTier, tier: RemoteTier) -> None:
    for seed in range(700):
        disk.write(make_chunk(seed, layers=1, e_layers=()))
    keys = tier.keys()
    assert next(keys) in {make_key(seed) for seed in range(700)}
    assert tier.head(make_key(0)) is not None  # while the listing is open
    assert len({next(keys), *keys}) == 699
    abandoned = tier.keys()
    next(abandoned)
    del abandoned
    assert len(list(tier.keys())) == 700


# Tokens, tenants, TLS

TOKENS = [
    {"name": "all", "token": TOKEN, "scopes": ["read", "write", "admin"]},
    {"name": "reader", "token": READER, "scopes": ["read"]},
]


@pytest.fixture
def locked() -> Iterator[int]:
    with (
        serving(TieredStore([MemoryTier(MIB)]), tokens=TOKENS) as port,
        RemoteTier(HOST, port, token=TOKEN) as tier,
    ):
        tier.write(make_chunk(1))
        yield port


CALLS: dict[str, Callable[[RemoteTier], object]] = {
    "head": lambda tier: tier.head(make_key(1)),
    "leading": lambda tier: tier.leading([make_key(seed) for seed in range(50)]),
    "read": lambda tier: tier.read(make_key(1)),
    "write": lambda tier: tier.write(make_chunk(1)),
    "delete": lambda tier: tier.delete(make_key(1)),
    "pin": lambda tier: tier.pin(make_key(1)),
    "unpin": lambda tier: tier.unpin(make_key(1)),
    "quarantine": lambda tier: tier.quarantine(make_key(1)),
    "keys": lambda tier: list(tier.keys()),
    "usage": lambda tier: tier.usage(),
    "evict": lambda tier: tier.evict(1),
}


def refused(tier: RemoteTier, call: str, kind: type[Exception] = TierUnavailable) -> str:
    """The one line with which `call` fails."""
    with pytest.raises(kind) as caught:
        CALLS[call](tier)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("token", [None, "another-token-of-many"])
@pytest.mark.parametrize("call", CALLS)
def test_without_the_right_token_it_is_unavailable_and_says_why(
    locked: int, call: str, token: str | None
) -> None:
    with RemoteTier(HOST, locked, token=token) as tier:
        told = refused(tier, call)
    assert "unauthorized" in told
    assert str(locked) in told
    assert token is None or token not in told


def test_a_reader_reads_and_changes_nothing(locked: int) -> None:
    with RemoteTier(HOST, locked, token=READER) as tier:
        assert_holds(tier.read(make_key(1)), make_chunk(1))
        assert list(tier.keys()) == [make_key(1)]
        assert tier.usage().chunks == 1
        for call in ("write", "delete", "pin", "unpin", "quarantine"):
            assert "forbidden" in refused(tier, call)
        assert tier.evict(1) == 0
        assert_holds(tier.read(make_key(1)), make_chunk(1))
    with RemoteTier(HOST, locked, token=TOKEN) as tier:
        assert tier.evict(1) > 0
        assert tier.read(make_key(1)) is None


def test_where_the_token_comes_from(locked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with RemoteTier(HOST, locked, token_file=file) as tier:
        assert tier.head(make_key(1)) is not None
    monkeypatch.setenv("DROIDSPEAK_TOKEN", TOKEN)
    with RemoteTier(HOST, locked) as tier:
        assert tier.head(make_key(1)) is not None
        assert TOKEN not in repr(tier)
    with RemoteTier(HOST, locked, token="another-token-of-many") as tier:
        assert "unauthorized" in refused(tier, "head")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": TOKEN, "token_file": Path("/x")}, "token and token_file; one is allowed"),
        ({"token_file": Path("/nobody/made/this")}, "token_file /nobody/made/this: No such file"),
        ({"token": "two words-not-told"}, "http://127.0.0.1:1: the token is empty, or has more"),
        ({"token": "zwölf-not-told"}, "has more than printable ASCII in it"),
        ({"ca": Path("/x")}, "allowed with tls=true"),
        ({"ca": Path("/nobody/made/this"), "tls": True}, "ca /nobody/made/this: No such file"),
    ],
    ids=["two", "no-file", "blank", "unicode", "ca-without-tls", "no-ca"],
)
def test_what_cannot_be_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        RemoteTier(HOST, 1, **options)
    assert "not-told" not in str(caught.value)


def test_tenants_are_apart() -> None:
    stores = {name: TieredStore([MemoryTier(MIB)], name=name or "store") for name in ("", "acme")}
    tenants = {"acme": {"tiers": ["cpu://"]}}
    with serving(stores, tenants=tenants) as port, ExitStack() as opened:
        default, acme, nobody = (
            opened.enter_context(RemoteTier(HOST, port, tenant=name)) for name in (None, "acme", "x&y/é")
        )
        default.write(make_chunk(1))
        acme.write(make_chunk(2))
        assert (list(default.keys()), list(acme.keys())) == ([make_key(1)], [make_key(2)])
        assert default.head(make_key(2)) is acme.read(make_key(1)) is None
        assert acme.pin(make_key(2))
        assert acme.evict(1) == 0
        assert default.evict(1) > 0
        for call in CALLS:
            assert "unknown_tenant" in refused(nobody, call)


def test_tls(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    certificate, key = self_signed(tmp_path / "ours")
    other, _ = self_signed(tmp_path / "theirs")
    tls = TlsSettings(certificate=certificate, key=key)
    with serving(TieredStore([MemoryTier(MIB)]), tls=tls) as port:
        with RemoteTier(HOST, port, tls=True, ca=certificate) as tier:
            tier.write(BAIT)
            assert_holds(tier.read(BAIT.key), BAIT)
            assert list(tier.keys()) == [BAIT.key]
        for ca in (other, None):
            with RemoteTier(HOST, port, tls=True, ca=ca) as tier:
                for call in CALLS:
                    assert "certificate verify failed" in refused(tier, call)
        with RemoteTier("localhost", port, tls=True, ca=certificate) as tier:
            assert "certificate" in refused(tier, "head")
        with RemoteTier(HOST, port, timeout=2) as tier:
            refused(tier, "head")


def test_tls_where_there_is_none(port: int) -> None:
    with RemoteTier(HOST, port, tls=True, timeout=2) as tier:
        assert f"https://{HOST}:{port}" in refused(tier, "head")


# Failures


@pytest.mark.parametrize("call", CALLS)
def test_a_daemon_that_is_not_there(call: str) -> None:
    port = closed_port()
    with RemoteTier(HOST, port) as tier:
        assert f"daemon at http://{HOST}:{port}: Connection refused" in refused(tier, call)


def test_a_host_that_is_not_there() -> None:
    with RemoteTier("nobody.invalid", 1) as tier:
        assert "nobody.invalid" in refused(tier, "head")


@pytest.mark.parametrize("call", CALLS)
def test_a_silent_daemon_times_out(call: str) -> None:
    gate = threading.Event()
    try:
        with raw_server(lambda _: bool(gate.wait(30))) as port, RemoteTier(HOST, port, timeout=0.2) as tier:
            assert "no answer within 0.2 s" in refused(tier, call, TierTimeout)
    finally:
        gate.set()


def test_a_daemon_that_stops_in_the_middle_of_an_answer_times_out() -> None:
    gate = threading.Event()

    def half(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(
            b'HTTP/1.1 206 OK\r\nETag: "x"\r\nContent-Range: bytes 0-7/99999\r\n'
            b"Content-Length: 8\r\n\r\n" + bytes(3)
        )
        gate.wait(30)

    try:
        with raw_server(half) as port, RemoteTier(HOST, port, timeout=0.2) as tier:
            refused(tier, "read", TierTimeout)
    finally:
        gate.set()


def test_a_daemon_that_takes_no_more_of_a_body_times_out() -> None:
    gate = threading.Event()
    try:
        with raw_server(lambda _: bool(gate.wait(30))) as port, RemoteTier(HOST, port, timeout=0.3) as tier:
            big = make_chunk(1, layers=64, tokens=8192)
            with pytest.raises(TierTimeout):
                tier.write(big)
    finally:
        gate.set()


def hangs_up(connection: socket.socket) -> None:
    connection.recv(1 << 16)


def talks_garbage(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"\x00\xff\x00\xffgarbage\n\n" * 100)


def greets_as_ssh(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    connection.recv(1 << 16)


@pytest.mark.parametrize("serve", [hangs_up, talks_garbage, greets_as_ssh])
@pytest.mark.parametrize("call", CALLS)
def test_a_server_of_another_kind(serve: Callable[[socket.socket], None], call: str) -> None:
    with raw_server(serve) as port, RemoteTier(HOST, port) as tier:
        assert str(port) in refused(tier, call)


def _error(reason: object, message: object = "no\nreason\n") -> bytes:
    return json.dumps({"error": {"reason": reason, "message": message}}).encode()


Answer = tuple[int, bytes, Mapping[str, str]]
FOREIGN: dict[str, Answer] = {
    "404 page": (404, b"<html>Not Found</html>", {}),
    "404 empty": (404, b"", {}),
    "404 other json": (404, b'{"detail": "Not Found"}', {}),
    "404 odd json": (404, b'{"error": "not_found"}', {}),
    "404 odd reason": (404, _error(["not_found"]), {}),
    "404 odd message": (404, _error("not_found", 7), {}),
    "200 page": (200, b"<html>Welcome</html>", {}),
    "200 empty": (200, b"", {}),
    "200 null": (200, b"null", {}),
    "200 list": (200, b"[]", {}),
    "200 odd json": (200, b'{"chunks": [{}], "tiers": [{}], "freed": "9", "key": 1}', {}),
    "200 deep json": (200, b"[" * 100_000, {}),
    "200 negative": (200, b'{"chunks": [{"key": null}], "tiers": [{"name": "x", "chunks": 1.5}]}', {}),
    "206 page": (206, b"<html>", {"Content-Range": "bytes 0-5/6"}),
    "206 odd range": (206, b"<html>", {"Content-Range": "bytes 5-0/6", "ETag": '"x"'}),
    "206 other range": (206, b"<html>", {"Content-Range": "bytes 1-6/7", "ETag": '"x"'}),
    "redirect": (302, b"", {"Location": "http://127.0.0.1:9/login"}),
    "500": (500, b"oops", {}),
    "502 of a proxy": (502, b"<html>Bad Gateway</html>", {}),
    "403 of a proxy": (403, b"<html>Forbidden</html>", {}),
}


@pytest.mark.parametrize("answer", FOREIGN)
def test_an_http_server_that_is_no_daemon(answer: str) -> None:
    status, body, headers = FOREIGN[answer]
    with answering(status, body, headers) as port, RemoteTier(HOST, port) as tier:
        for call in CALLS:
            if call == "keys" and not body and status == 200:
                continue  # an empty listing
            assert str(port) in refused(tier, call)


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (503, "unavailable", TierUnavailable),
        (500, "internal", TierUnavailable),
        (400, "bad_request", TierUnavailable),
        (416, "bad_range", TierUnavailable),
        (401, "unauthorized", TierUnavailable),
        (403, "forbidden", TierUnavailable),
        (418, "of the future", TierUnavailable),
        (504, "timeout", TierTimeout),
        (507, "full", TierFull),
        (413, "too_large", TierFull),
        (404, "corrupt", ChunkCorrupt),
        (422, "not_a_chunk", ChunkCorrupt),
    ],
)
def test_what_refusals_mean(status: int, reason: str, kind: type[Exception]) -> None:
    with answering(status, _error(reason)) as port, RemoteTier(HOST, port) as tier:
        for call in CALLS:
            told = refused(tier, call, kind)
            assert f"no reason ({reason})" in told


@pytest.mark.parametrize("reason", ["not_found", "changed"])
def test_a_miss_is_a_miss_only_where_a_chunk_was_asked_for(reason: str) -> None:
    with (
        answering(404 if reason == "not_found" else 412, _error(reason)) as port,
        RemoteTier(HOST, port) as tier,
    ):
        assert tier.read(make_key(1)) is None
        for call in ("head", "leading", "keys", "usage", "evict"):
            assert "no answer of a DroidSpeak daemon" in refused(tier, call)


def test_another_chunk_than_the_one_asked_for_is_no_answer() -> None:
    row = {"key": str(make_key(2)), "tokens": 1, "nbytes": 1, "e_layers": [], "codec": "raw"}
    with answering(200, json.dumps({"chunks": [row]}).encode()) as port, RemoteTier(HOST, port) as tier:
        assert "other chunks" in refused(tier, "head")


def test_a_listing_that_breaks_off_is_an_error() -> None:
    line = json.dumps({"key": str(make_key(1))}).encode() + b"\n"

    def half(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"%x\r\n%b\r\n" % (len(line), line))

    with raw_server(half) as port, RemoteTier(HOST, port) as tier:
        keys = tier.keys()
        assert next(keys) == make_key(1)
        with pytest.raises(TierUnavailable):
            next(keys)


def test_a_line_without_end_is_no_answer() -> None:
    with answering(200, b"x" * 300_000) as port, RemoteTier(HOST, port) as tier:
        assert "a line without end" in refused(tier, "keys")


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_connection_that_breaks_is_made_anew(watched: RemoteTier, wire: Wire, failures: int) -> None:
    watched.write(BAIT)
    watched.read(BAIT.key, [])
    wire.reset()
    wire.cuts = failures
    if failures < 3:
        assert_holds(watched.read(BAIT.key, Slot.kv([5])), BAIT, Slot.kv([5]))
        assert watched.pin(BAIT.key)
    else:
        refused(watched, "read")
    assert wire.cuts == 0
    tries = [request for request in wire.requests if request.startswith("GET")]
    assert len(tries) == min(failures + 1, 3)
    assert_holds(watched.read(BAIT.key), BAIT)


def test_connections_that_the_daemon_has_closed_are_made_anew(disk: DiskTier) -> None:
    port = 0
    with ExitStack() as first:
        port = first.enter_context(serving(WritesThrough([disk])))
        tier = RemoteTier(HOST, port, timeout=30)
        tier.write(BAIT)
        assert_holds(tier.read(BAIT.key), BAIT)
    refused(tier, "head")
    with serving(WritesThrough([DiskTier(disk.root, min_free=0)]), port=port):
        assert_holds(tier.read(BAIT.key), BAIT)
    tier.close()


def test_after_an_error_nobody_writes_into_the_reader_s_memory(
    tier: RemoteTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.write(BAIT)
    tier.read(BAIT.key, [])
    apart = Slot.kv([0, 3])
    fetch, finished = tier._fetch, []

    def first_fails_and_second_is_slow(key: ChunkKey, etag: str, start: int, *rest: Any) -> None:
        if start == BAIT.header.data_start + BAIT.header.records[apart[0]].start:
            raise TierUnavailable("broken")
        time.sleep(0.1)
        fetch(key, etag, start, *rest)
        finished.append(start)

    monkeypatch.setattr(tier, "_fetch", first_fails_and_second_is_slow)
    with pytest.raises(TierUnavailable, match="broken"):
        tier.read(BAIT.key, apart)
    assert len(finished) == 1


class Watched(dict[Slot, torch.Tensor]):
    """A dict that can be watched."""


@pytest.mark.parametrize("failure", ["damage", "outage"])
def test_after_an_error_the_reader_s_memory_is_let_go(
    watched: RemoteTier, wire: Wire, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.write(BAIT)
    watched.read(BAIT.key, [])
    if failure == "outage":
        wire.cuts = 100
    else:
        monkeypatch.setattr(remote, "fill", lambda target, answer: None)
    into = Watched({slot: torch.zeros_like(BAIT.tensor(slot)) for slot in Slot.kv([0, 3])})
    memory = [weakref.ref(into), *map(weakref.ref, into.values())]
    gc.collect()
    gc.disable()
    try:
        with suppress(StorageError):
            watched.read(BAIT.key, list(into), into)
        del into
        assert eventually(lambda: not any(ref() is not None for ref in memory))
    finally:
        gc.enable()


def test_a_large_body_that_is_refused(large: Chunk) -> None:
    server = {"tokens": TOKENS, "max_object": 1 << 20, "in_flight": 1 << 20}
    with serving(TieredStore([MemoryTier(64 * MIB)]), **server) as port:
        for token, kind in ((READER, TierUnavailable), (TOKEN, TierFull)):
            with RemoteTier(HOST, port, token=token) as tier:
                with pytest.raises(kind):
                    tier.write(large)
                assert list(tier.keys()) == []


def test_no_proxy_of_the_environment_is_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{HOST}:{closed_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with RemoteTier(HOST, port) as tier:
        assert tier.read(make_key(1)) is None


def test_a_closed_tier_is_unavailable(tier: RemoteTier) -> None:
    tier.write(BAIT)
    tier.read(BAIT.key, [])
    tier.close()
    tier.close()
    with pytest.raises(TierUnavailable, match="tier remote"):
        tier.read(BAIT.key, Slot.kv([0, 3]))
    for call in CALLS:
        if call != "keys":  # which has a connection of its own
            refused(tier, call)


def _ask(tier: RemoteTier, pipe: Any) -> None:
    try:
        tier.read(BAIT.key, Slot.kv([0, 3]))
    except TierUnavailable as error:
        pipe.send(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_its_own(tier: RemoteTier) -> None:
    tier.write(BAIT)
    assert_holds(tier.read(BAIT.key), BAIT)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_ask, args=(tier, theirs))
    child.start()
    try:
        assert ours.poll(30)
        assert "forked" in ours.recv()
        child.join(30)
        assert_holds(tier.read(BAIT.key, Slot.kv([0, 3])), BAIT, Slot.kv([0, 3]))
    finally:
        child.kill()
        child.join()
        ours.close()
        theirs.close()


def test_without_urllib3_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['urllib3'] = None\n"
        "from droidspeak.errors import MissingExtra\n"
        "from droidspeak.storage.urls import open_tier\n"
        "try: open_tier('droidspeak://host')\n"
        "except MissingExtra as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "droidspeak[remote]" in told


# A process of its own


class Daemon:
    """`droidspeak serve` over a folder; killed at the end if it still runs."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "droidspeak", "serve", HOST, "0", "--http", f"{HOST}:0"]
        command += ["--tier", f"disk://{folder}?min_free=0", "--log-level", "error"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        ready = self.process.stdout.readline()
        self.port = int(ready.rpartition(":")[2])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="module")
def large() -> Chunk:
    """32 MiB: more than fits in the sockets' buffers."""
    tensors = {
        slot: torch.full((256, 8, 256), slot.layer, dtype=torch.bfloat16) for slot in Slot.kv(range(16))
    }
    return Chunk.encode(make_key(7), tensors)


def test_a_daemon_that_is_killed_in_the_middle_of_a_read(
    tmp_path: Path, large: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []

    def kill_at_first(target: memoryview, answer: Any) -> None:
        daemonclient.fill(target, answer)
        if not killed:
            killed.append(answer)
            daemon.kill()

    with Daemon(tmp_path) as daemon, RemoteTier(HOST, daemon.port, timeout=30, concurrency=1) as tier:
        tier.write(large)
        assert eventually(lambda: tier.usage().chunks == 1)
        assert_holds(tier.read(large.key, Slot.kv([3])), large, Slot.kv([3]))
        monkeypatch.setattr(remote, "fill", kill_at_first)
        with pytest.raises(TierUnavailable, match="Connection refused"):
            tier.read(large.key)
        refused(tier, "head")
    assert len(killed) == 1
    monkeypatch.undo()
    with Daemon(tmp_path) as daemon, RemoteTier(HOST, daemon.port, timeout=30) as tier:
        assert_holds(tier.read(large.key), large)


def test_a_store_goes_on_without_its_daemon(tmp_path: Path) -> None:
    limits = {"remote": Limits(cooldown=0.1, max_cooldown=0.2)}
    dead = RemoteTier(HOST, closed_port())
    with TieredStore([MemoryTier(MIB), dead], limits=limits) as store:
        store.write(make_chunk(1))
        assert store.flush(30)
        assert_holds(store.read(make_key(1)), make_chunk(1))
        assert store.leading([make_key(1), make_key(2)]) == [ChunkInfo.of(make_chunk(1))]
        assert store.counters.get("write_failures", "remote") == 1
    with Daemon(tmp_path) as daemon:
        tiers = MemoryTier(MIB), RemoteTier(HOST, daemon.port, timeout=30)
        with TieredStore(tiers, limits=limits, promote=False) as store:
            store.write(make_chunk(1))
            assert store.flush(30)
            assert store.persisted(make_key(1), 30)
            assert eventually(lambda: tiers[1].usage().chunks == 1)
            assert tiers[0].delete(make_key(1))
            assert_holds(store.read(make_key(1)), make_chunk(1))
            store.write(make_chunk(2))
            assert store.flush(30)
            daemon.kill()
            assert_holds(store.read(make_key(2)), make_chunk(2))
            with pytest.raises(TierUnavailable):
                store.read(make_key(1))
            assert store.leading([make_key(2), make_key(1)]) == [ChunkInfo.of(make_chunk(2))]
            store.write(make_chunk(3))
            assert_holds(store.read(make_key(3)), make_chunk(3))
