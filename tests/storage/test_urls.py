"""Tiers by URL and mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import ConfigError
from droidspeak.storage.daemonclient import DaemonClient
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.eviction import LRU, S3FIFO
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.remote import RemoteTier
from droidspeak.storage.s3 import S3Tier
from droidspeak.storage.testing import assert_holds, make_chunk
from droidspeak.storage.urls import open_tier, parse_size

GIB = 1 << 30


def memory(description: str | dict[str, Any]) -> MemoryTier:
    tier = open_tier(description)
    assert isinstance(tier, MemoryTier)
    return tier


def test_cpu() -> None:
    tier = memory("cpu://?capacity=8GiB&eviction=s3-fifo&name=ram")
    assert tier.usage().capacity == 8 * GIB
    assert isinstance(tier._policy, S3FIFO)
    assert (tier.name, tier.device.type) == ("ram", "cpu")


def test_defaults() -> None:
    tier = memory("cpu://")
    assert (tier.usage().capacity, tier.name) == (4 * GIB, "cpu")
    assert isinstance(tier._policy, LRU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="no device cuda:1"):
        open_tier("gpu://1?capacity=1GiB")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu() -> None:
    assert memory("gpu://0?capacity=1MiB").device == torch.device("cuda:0")
    assert memory({"type": "gpu", "device": 0}).device == torch.device("cuda:0")


@pytest.mark.parametrize("as_mapping", [False, True])
def test_disk(tmp_path: Path, as_mapping: bool) -> None:
    description: Any = f"disk://{tmp_path}/a%20b?capacity=2GiB&min_free=0&eviction=s3-fifo&name=ssd"
    if as_mapping:
        description = {"type": "disk", "path": tmp_path / "a b", "capacity": 2 * GIB, "min_free": 0}
        description |= {"eviction": "s3-fifo", "name": "ssd", "read_only": False}
    with open_tier(description) as tier:
        assert isinstance(tier, DiskTier)
        assert tier.root == tmp_path / "a b"
        assert (tier.name, tier.usage().capacity) == ("ssd", 2 * GIB)
        tier.write(make_chunk(1))
    with open_tier(f"disk://{tmp_path}/a b?read_only=true&min_free=0") as tier:
        assert_holds(tier.read(make_chunk(1).key), make_chunk(1))


@pytest.mark.parametrize("description", ["disk://~/cache", {"type": "disk", "path": "~/cache"}])
def test_disk_in_the_home_folder(description: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_tier(description) as tier:
        assert isinstance(tier, DiskTier)
        assert tier.root == tmp_path / "cache"


@pytest.mark.parametrize("as_mapping", [False, True])
def test_s3(as_mapping: bool, s3_endpoint: str) -> None:
    description: Any = f"s3://some-bucket/a/b/?endpoint={s3_endpoint}&region=eu-west-1&timeout=2.5&attempts=2"
    if as_mapping:
        description = {"type": "s3", "bucket": "some-bucket", "prefix": "a/b", "endpoint": s3_endpoint}
        description |= {"region": "eu-west-1", "timeout": 2.5, "attempts": 2, "concurrency": None}
    with open_tier(description) as tier:
        assert isinstance(tier, S3Tier)
        assert (tier._bucket, tier._folder) == ("some-bucket", "a/b/chunks/")
        meta = tier._client.meta
        assert (meta.endpoint_url, meta.region_name) == (s3_endpoint, "eu-west-1")
        assert meta.config.connect_timeout == meta.config.read_timeout == 2.5
        assert meta.config.retries["total_max_attempts"] == 2


def test_s3_without_a_prefix(s3_endpoint: str) -> None:
    with open_tier(f"s3://some-bucket?endpoint={s3_endpoint}") as tier:
        assert isinstance(tier, S3Tier)
        assert tier._folder == "chunks/"


def client(description: Any) -> DaemonClient:
    with open_tier(description) as tier:
        assert isinstance(tier, RemoteTier)
        return tier._client


@pytest.mark.parametrize("as_mapping", [False, True])
def test_daemon(as_mapping: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DROIDSPEAK_TOKEN", raising=False)
    (tmp_path / "token").write_text("some-token\n")
    options: dict[str, Any] = {"token_file": tmp_path / "token", "tls": True, "timeout": 2.5}
    options |= {"tenant": "acme & sons", "concurrency": 3, "name": "far"}
    description: Any = {"type": "droidspeak", "host": "cache.internal", "port": 1234, **options}
    if as_mapping:
        description |= {"token_file": None, "token": "some-token"}
    else:
        query = urlencode({**options, "tls": "true"})
        description = f"droidspeak://cache.internal:1234?{query}"
    with open_tier(description) as tier:
        assert isinstance(tier, RemoteTier)
        assert tier.name == "far"
        asked = tier._client
    assert asked.where == "daemon at https://cache.internal:1234"
    assert asked._headers["Authorization"] == "Bearer some-token"
    assert (asked._query, asked._timeout, asked._connections) == ("tenant=acme%20%26%20sons", 2.5, 3)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("droidspeak://host", "http://host:65433"),
        ("droidspeak://host/", "http://host:65433"),
        ("droidspeak://[::1]", "http://[::1]:65433"),
        ("droidspeak://[::1]:80?tls=false", "http://[::1]:80"),
        ("droidspeak://10.0.0.1:80?tls=true", "https://10.0.0.1:80"),
    ],
)
def test_where_the_daemon_is(url: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DROIDSPEAK_TOKEN", raising=False)
    asked = client(url)
    assert asked.where == f"daemon at {where}"
    assert "Authorization" not in asked._headers


WRONG: list[tuple[Any, str]] = [
    ("", "allowed: cpu://, gpu://, disk://, s3://, droidspeak://"),
    ("/var/cache", "allowed: cpu://"),
    ("redis://host", "unknown tier 'redis'"),
    ({"path": "/x"}, "unknown tier None"),
    ({"type": ["disk"]}, "unknown tier"),
    ("cpu://?capacity", "allowed is scheme://"),
    ("cpu://[", "allowed is scheme://"),
    ("cpu://?size=8GiB", "unknown option size; allowed: capacity, eviction, name"),
    ("cpu://?min_free=1", "unknown option min_free"),
    ({"type": "cpu", 3: 4}, "unknown option 3"),
    ("cpu://0", "names no place"),
    ("cpu://?type=disk", "the scheme is the type"),
    ("cpu://?capacity=1&capacity=2", "each once"),
    ("cpu://?capacity=1#here", "allowed are"),
    ("cpu://?capacity=8 gigs", "not a size: '8 gigs'; allowed is a number with or without B, KB"),
    ("cpu://?capacity=0", "above 0"),
    ("cpu://?capacity=-1", "not a size"),
    ({"type": "cpu", "capacity": -1}, "not a size"),
    ({"type": "cpu", "capacity": True}, "not a size"),
    ({"type": "cpu", "capacity": 1.5}, "not a size"),
    ("cpu://?eviction=random", "unknown eviction 'random'; allowed: lru, s3-fifo"),
    ({"type": "cpu", "eviction": 3}, "not a text"),
    ("cpu://?name=", "not a text"),
    ("gpu://zero", "not a device number"),
    ("gpu://0/1", "gpu://0"),
    ("gpu://0?device=1", "stands before"),
    ({"type": "gpu", "device": True}, "not a device number"),
    ("disk://", "path is missing"),
    ("disk://cache/x", "relative path 'cache/x'; allowed are /absolute/path"),
    ("disk:cache", "relative path"),
    ("disk:///x?path=/y", "stands before"),
    ({"type": "disk", "path": "cache"}, "relative path"),
    ({"type": "disk", "path": 7}, "not a path"),
    ("disk://~nobody-has-this-name/x", "not a path"),
    ("disk:///x?read_only=maybe", "allowed: true, false"),
    ({"type": "disk", "path": "/x", "read_only": 2}, "allowed: true, false"),
    ({"type": "disk", "path": "/x", "read_only": []}, "allowed: true, false"),
    ("s3://", "bucket is missing"),
    ("s3://bucket?endpoint=localhost:9000", "allowed are http://host:port"),
    ("s3://bucket?endpoint=http://[", "allowed are http://host:port"),
    ("s3://bucket?timeout=0", "seconds above 0"),
    ("s3://bucket?timeout=soon", "seconds above 0"),
    ("s3://bucket?attempts=0", "not a number above 0"),
    ({"type": "s3", "bucket": "b", "attempts": True}, "not a number above 0"),
    ("droidspeak://", "host is missing"),
    ("droidspeak://:1", "host is missing"),
    ("droidspeak://host/path", "names a daemon"),
    ("droidspeak://host:0", "not a number above 0"),
    ("droidspeak://host:65536", "ports up to 65535"),
    ("droidspeak://host:http", "not a number above 0"),
    ("droidspeak://host?port=1&host=x", "host stands before"),
    ("droidspeak://host?tls=yes", "allowed: true, false"),
    ("droidspeak://host?ca=/x", "allowed with tls=true"),
    ("droidspeak://host?token_file=x", "relative path"),
    ("droidspeak://host?token_file=/nobody/made/this", "token_file /nobody/made/this: No such file"),
    ("droidspeak://host?token=", "allowed is token_file"),
    ({"type": "droidspeak", "host": "h", "token": 7}, "token: not a text"),
    ({"type": "droidspeak", "host": "h", "token": "x", "token_file": "/x"}, "one is allowed"),
]


@pytest.mark.parametrize(("description", "message"), WRONG, ids=str)
def test_one_line_says_what_is_wrong_and_what_is_allowed(description: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_tier(description)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "description",
    [
        "s3://KEY:hunter2@bucket/x",
        "s3://bucket?endpoint=http://KEY:hunter2@host",
        "s3://KEY:hunter2@[",
        "droidspeak://KEY:hunter2@host",
        "droidspeak://host?token=hunter2",
        "droidspeak://host?%74oken=hunter2",
        "droidspeak://host?tls=true&token=hunter2&token=hunter2",
        "droidspeak://host?token=hunter2#x",
        "redis://host?token=hunter2",
        {"type": "droidspeak", "host": "h", "token": ["hunter2"]},
        {"type": "droidspeak", "host": "h", "token": "hunter2 hunter2"},
        {"type": "droidspeak", "token": "hunter2"},
    ],
    ids=str,
)
def test_secrets_are_refused_and_not_repeated(description: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        open_tier(description)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2 MB", 2_000_000),
        ("1.5MiB", 1_572_864),
        (" 3GB ", 3 * 10**9),
        ("8GiB", 8 << 30),
        ("200GiB", 200 << 30),
        ("1TB", 10**12),
        ("0.5TiB", 1 << 39),
        (17, 17),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(st.integers(0, 1 << 70), st.sampled_from([("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)]))
def test_large_sizes_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number << unit[1]


@pytest.mark.parametrize("text", ["", "GiB", "8 G", "8gib", "8GB/s", "1e9", "-1", "1,5GB", "٣", None, 1.0])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        parse_size(text)
