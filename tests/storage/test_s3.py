"""The S3 tier against moto's real HTTP server: conformance, requests and bytes on the wire, failures."""

from __future__ import annotations

import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, settings

from droidspeak.errors import ChunkCorrupt, ConfigError, MissingExtra, TierTimeout, TierUnavailable
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.s3 import S3Tier
from droidspeak.storage.testing import (
    TierConformance,
    TierStateMachine,
    assert_holds,
    make_chunk,
    make_key,
)
from droidspeak.storage.tier import ChunkInfo

BUCKET = "droidspeak-tests"
E1 = Slot(SlotKind.E, 1)


@pytest.fixture(scope="session")
def client(s3_endpoint: str) -> Any:
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=BUCKET)
    yield client
    client.close()


@pytest.fixture
def tier(client: Any, s3_endpoint: str) -> Iterator[S3Tier]:
    with S3Tier(BUCKET, uuid.uuid4().hex, endpoint=s3_endpoint) as tier:
        yield tier


def put_behind(client: Any, tier: S3Tier, key: ChunkKey, data: bytes, *, metadata: bool = True) -> None:
    """Replaces the object's bytes and leaves its metadata as it was."""
    where = {"Bucket": BUCKET, "Key": tier._path(key)}
    kept = client.head_object(**where)["Metadata"] if metadata else {}
    client.put_object(**where, Body=data, Metadata=kept)


class TestS3Tier(TierConformance):
    persistent = True
    reads_ranges = True
    operations = 12

    @pytest.fixture(autouse=True)
    def _endpoint(self, client: Any, s3_endpoint: str) -> None:
        self.client, self.endpoint = client, s3_endpoint

    def make_tier(self, place: Path, capacity: int | None = None) -> S3Tier:
        return S3Tier(BUCKET, f"some/{place.parent.name}/{place.name}/", endpoint=self.endpoint)

    def get_bytes(self, tier: S3Tier, key: ChunkKey) -> bytes | None:
        try:
            return self.client.get_object(Bucket=BUCKET, Key=tier._path(key))["Body"].read()
        except ClientError:
            return None

    def put_bytes(self, tier: S3Tier, key: ChunkKey, data: bytes) -> None:
        put_behind(self.client, tier, key, data)

    def drop(self, tier: S3Tier, key: ChunkKey) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=tier._path(key))


def test_any_sequence_of_calls_gives_what_a_dict_would_give(client: Any, s3_endpoint: str) -> None:
    class Machine(TierStateMachine):
        persistent = True

        def make_tier(self, place: Path, capacity: int | None = None) -> S3Tier:
            return S3Tier(BUCKET, place.name, endpoint=s3_endpoint)

    case = Machine.TestCase("runTest")
    case.settings = settings(
        max_examples=6,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case.runTest()


# What goes over the wire


@dataclass
class Wire:
    """Requests and body bytes of a tier, by operation."""

    requests: list[str] = field(default_factory=list)
    received: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, parsed: dict[str, Any], model: Any, **_more: Any) -> None:
        with self.lock:
            self.requests.append(model.name)
            self.received += parsed.get("ContentLength", 0) if model.name == "GetObject" else 0

    def reset(self) -> None:
        self.requests, self.received = [], 0


@pytest.fixture
def wire(tier: S3Tier) -> Wire:
    wire = Wire()
    tier._client.meta.events.register("after-call.s3", wire.note)
    return wire


def test_object_layout_and_metadata(client: Any, tier: S3Tier) -> None:
    chunk = make_chunk(1, layers=3, e_layers=(0, 2), codec="zstd")
    tier.write(chunk)
    path = f"{tier._folder}{chunk.key.source}/0of1/{chunk.key.prefix}.safetensors"
    answer = client.get_object(Bucket=BUCKET, Key=path)
    assert answer["Body"].read() == chunk.to_bytes()
    assert answer["Metadata"] == {
        "tokens": "16",
        "header-bytes": str(chunk.header.data_start),
        "e-layers": "0,2",
        "codec": "zstd",
        "salt": "",
        "slot-bytes": ",".join(map(str, chunk.header.slot_bytes)),
    }


def test_head_is_one_head_request(tier: S3Tier, wire: Wire) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    wire.reset()
    assert tier.head(chunk.key) == ChunkInfo.of(chunk)
    assert tier.head(make_key(2)) is None
    assert wire.requests == ["HeadObject", "HeadObject"]


def test_one_layer_is_the_header_and_that_range_only(tier: S3Tier, wire: Wire) -> None:
    chunk = make_chunk(1, layers=8, tokens=256)
    tier.write(chunk)
    wire.reset()
    layer = Slot.kv([3])
    assert_holds(tier.read(chunk.key, layer), chunk, layer)
    assert wire.requests == ["HeadObject", "GetObject", "GetObject"]
    assert wire.received == chunk.header.data_start + sum(chunk.payload[slot].numel() for slot in layer)
    wire.reset()
    assert_holds(tier.read(chunk.key, [E1]), chunk, [E1])
    assert wire.requests == ["GetObject"]
    assert wire.received == chunk.payload[E1].numel()


def test_neighbours_share_a_request_up_to_the_best_size(tier: S3Tier, wire: Wire) -> None:
    chunk = make_chunk(1, layers=8, e_layers=())
    tier.write(chunk)
    tier.read(chunk.key, [])
    wire.reset()
    assert_holds(tier.read(chunk.key), chunk)
    assert wire.requests == ["GetObject"]
    wire.reset()
    apart = Slot.kv([0, 1, 4, 7])
    assert_holds(tier.read(chunk.key, apart), chunk, apart)
    assert wire.requests == ["GetObject"] * 3
    wire.reset()
    tier.best_read = 4 * chunk.payload[apart[0]].numel()
    assert_holds(tier.read(chunk.key), chunk)
    assert wire.requests == ["GetObject"] * 4
    assert wire.received == chunk.nbytes


def test_leading_asks_in_growing_batches(tier: S3Tier, wire: Wire) -> None:
    chunks = [make_chunk(seed, layers=1, e_layers=()) for seed in range(6)]
    for chunk in chunks:
        tier.write(chunk)
    wire.reset()
    keys = [make_key(seed) for seed in range(100)]
    assert tier.leading(keys) == [ChunkInfo.of(chunk) for chunk in chunks]
    assert wire.requests == ["HeadObject"] * 12


def test_into_is_filled_without_a_copy(tier: S3Tier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    into = {slot: torch.zeros_like(chunk.tensor(slot)) for slot in Slot.kv([0, 1])}
    got = tier.read(chunk.key, into=into)
    assert got is not None
    assert_holds(got, chunk)
    assert all(got.payload[slot].data_ptr() == tensor.data_ptr() for slot, tensor in into.items())


# Objects that change behind the tier's back


def test_a_replaced_object_is_read_anew(client: Any, tier: S3Tier, wire: Wire) -> None:
    old, new = make_chunk(1), make_chunk(2, key=make_key(1), layers=3, e_layers=())
    tier.write(old)
    assert_holds(tier.read(old.key), old)
    put_behind(client, tier, old.key, new.to_bytes(), metadata=False)
    wire.reset()
    assert_holds(tier.read(old.key), new)
    assert wire.requests == ["GetObject", "HeadObject", "GetObject", "GetObject", "GetObject"]


def test_an_object_replaced_in_the_middle_of_a_read_is_never_mixed(client: Any, tier: S3Tier) -> None:
    versions = [make_chunk(seed, key=make_key(0)) for seed in range(2)]
    tier.write(versions[0])
    fetch_header = tier._fetch_header

    def and_replace(key: ChunkKey, version: Any) -> Any:
        header = fetch_header(key, version)
        versions.reverse()
        put_behind(client, tier, key, versions[0].to_bytes())
        return header

    tier._fetch_header = and_replace  # type: ignore[method-assign]
    assert tier.read(make_key(0)) is None  # replaced at each of both attempts
    tier._fetch_header = fetch_header  # type: ignore[method-assign]
    assert_holds(tier.read(make_key(0)), versions[0])


def test_a_cached_header_is_no_false_hit(client: Any, tier: S3Tier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    assert_holds(tier.read(chunk.key), chunk)
    client.delete_object(Bucket=BUCKET, Key=tier._path(chunk.key))
    assert tier.read(chunk.key, [E1]) is None


def test_a_cached_header_hides_nothing_of_a_newer_object(client: Any, tier: S3Tier) -> None:
    old, new = make_chunk(1, e_layers=()), make_chunk(2, key=make_key(1), e_layers=(1,))
    tier.write(old)
    assert_holds(tier.read(old.key), old)
    put_behind(client, tier, old.key, new.to_bytes(), metadata=False)
    assert_holds(tier.read(old.key, [Slot(SlotKind.E, 1)]), new, [Slot(SlotKind.E, 1)])
    client.delete_object(Bucket=BUCKET, Key=tier._path(old.key))
    assert tier.read(old.key, []) is None


def test_metadata_may_be_lost(client: Any, tier: S3Tier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    put_behind(client, tier, chunk.key, chunk.to_bytes(), metadata=False)
    assert tier.head(chunk.key) == ChunkInfo.of(chunk)
    assert_holds(tier.read(chunk.key, [E1]), chunk, [E1])


@pytest.mark.parametrize("data", [b"", b"12345", b"\x01" * 500])
def test_what_is_no_chunk_is_corrupt_and_a_gap(client: Any, tier: S3Tier, data: bytes) -> None:
    for seed in range(2):
        tier.write(make_chunk(seed))
    put_behind(client, tier, make_key(1), data, metadata=False)
    for ask in (tier.head, tier.read):
        with pytest.raises(ChunkCorrupt):
            ask(make_key(1))
    assert tier.leading([make_key(0), make_key(1)]) == [ChunkInfo.of(make_chunk(0))]


def test_other_objects_in_the_folder_are_passed_over(client: Any, tier: S3Tier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    for name in ("README", "a/b/c.safetensors", f"{chunk.key}.tmp"):
        client.put_object(Bucket=BUCKET, Key=f"{tier._folder}{name}", Body=b"x")
    assert list(tier.keys()) == [chunk.key]
    assert tier.usage().chunks == 1
    assert tier.usage().capacity is None


def test_listing_goes_over_pages(tier: S3Tier, wire: Wire) -> None:
    tier._client.meta.events.register(
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_more: params.update(MaxKeys=2)
    )
    chunks = [make_chunk(seed) for seed in range(5)]
    for chunk in chunks:
        tier.write(chunk)
    wire.reset()
    assert set(tier.keys()) == {chunk.key for chunk in chunks}
    assert wire.requests == ["ListObjectsV2"] * 3


def test_headers_are_forgotten_oldest_first(tier: S3Tier) -> None:
    tier._headers._limit = 2
    for seed in range(3):
        tier.write(make_chunk(seed))
        tier.read(make_key(seed))
        tier.read(make_key(0))
    assert list(tier._headers._held) == [make_key(2), make_key(0)]


# Failures


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


CALLS = {
    "head": lambda tier: tier.head(make_key(1)),
    "leading": lambda tier: tier.leading([make_key(seed) for seed in range(50)]),
    "read": lambda tier: tier.read(make_key(1)),
    "write": lambda tier: tier.write(make_chunk(1)),
    "delete": lambda tier: tier.delete(make_key(1)),
    "quarantine": lambda tier: tier.quarantine(make_key(1)),
    "keys": lambda tier: list(tier.keys()),
    "usage": lambda tier: tier.usage(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_dead_endpoint_answers_at_once(call: str, s3_endpoint: str) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    start = time.monotonic()
    with (
        S3Tier("bucket", endpoint=endpoint, timeout=1, attempts=1) as tier,
        pytest.raises(TierUnavailable) as caught,
    ):
        CALLS[call](tier)
    assert time.monotonic() - start < 2
    assert "'bucket'" in str(caught.value)
    assert endpoint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_silent_endpoint_times_out(s3_endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with (
            S3Tier("bucket", endpoint=endpoint, timeout=0.2, attempts=1) as tier,
            pytest.raises(TierTimeout, match=endpoint),
        ):
            tier.read(make_key(1))
        assert time.monotonic() - start < 2


def test_a_request_is_tried_again(tier: S3Tier) -> None:
    seen = []

    def fail_first(request: Any, **_more: Any) -> Any:
        seen.append(request.method)
        return botocore_answer(503) if len(seen) == 1 else None

    chunk = make_chunk(1)
    tier.write(chunk)
    tier._client.meta.events.register("before-send.s3.HeadObject", fail_first)
    assert tier.head(chunk.key) == ChunkInfo.of(chunk)
    assert len(seen) == 2


def botocore_answer(status: int) -> Any:
    from botocore.awsrequest import AWSResponse

    class Raw:
        def stream(self) -> Iterator[bytes]:
            yield b""

    return AWSResponse("http://test", status, {}, Raw())


@pytest.mark.parametrize("failures", [1, 3])
def test_a_body_that_breaks_off_is_asked_for_again(
    tier: S3Tier, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.response import StreamingBody

    chunk = make_chunk(1)
    tier.write(chunk)
    tier.read(chunk.key, [])
    reads, broken = StreamingBody.readinto, []

    def readinto(body: Any, target: Any) -> int:
        if len(broken) < failures:
            broken.append(body)
            body._raw_stream.close()
            return int(reads(body, target))
        return int(reads(body, target))

    monkeypatch.setattr(StreamingBody, "readinto", readinto)
    if failures == 1:
        assert_holds(tier.read(chunk.key), chunk)
    else:
        with pytest.raises(TierUnavailable):
            tier.read(chunk.key)


def test_after_an_error_nobody_writes_into_the_reader_s_memory(
    tier: S3Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = make_chunk(1, layers=4)
    tier.write(chunk)
    tier.read(chunk.key, [])
    apart = Slot.kv([0, 3])
    fetch, finished = tier._get, []

    def first_fails_and_second_is_slow(key: ChunkKey, etag: str, start: int, *rest: Any) -> None:
        if start == chunk.header.data_start + chunk.header.records[apart[0]].start:
            raise TierUnavailable("broken")
        time.sleep(0.1)
        fetch(key, etag, start, *rest)
        finished.append(start)

    monkeypatch.setattr(tier, "_get", first_fails_and_second_is_slow)
    with pytest.raises(TierUnavailable, match="broken"):
        tier.read(chunk.key, apart)
    assert len(finished) == 1


def test_a_missing_bucket_is_unavailable(s3_endpoint: str) -> None:
    with S3Tier("nobody-made-this", endpoint=s3_endpoint) as tier:
        assert tier.head(make_key(1)) is None  # a HEAD request cannot tell
        with pytest.raises(TierUnavailable, match="nobody-made-this"):
            tier.write(make_chunk(1))
        with pytest.raises(TierUnavailable, match="nobody-made-this"):
            list(tier.keys())


def test_an_endpoint_without_range_requests_is_found_out(tier: S3Tier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)

    def drop_range(params: dict[str, Any], **_more: Any) -> None:
        params["headers"].pop("Range", None)

    tier._client.meta.events.register("before-call.s3.GetObject", drop_range)
    with pytest.raises(ChunkCorrupt):
        tier.read(chunk.key)


def test_a_bad_endpoint_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        S3Tier("bucket", endpoint="nonsense")


def test_a_closed_tier_is_unavailable(tier: S3Tier) -> None:
    tier.close()
    with pytest.raises(TierUnavailable, match="tier s3"):
        tier.leading([make_key(seed) for seed in range(3)])


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingExtra, match=r"droidspeak\[s3\]"):
        S3Tier("bucket")


def test_bytes_of_a_chunk_from_s3_open_in_safetensors(client: Any, tier: S3Tier) -> None:
    from safetensors.torch import load

    chunk = make_chunk(1)
    tier.write(chunk)
    body = client.get_object(Bucket=BUCKET, Key=tier._path(chunk.key))["Body"].read()
    assert load(body).keys() == {slot.name for slot in chunk.payload}
    assert Chunk.from_bytes(body, chunk.key).to_bytes() == body
