"""Bytes that LMCache's own classes wrote: we read them as it does, and write the same."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from droidspeak.config import load_settings
from droidspeak.integrations.server import wire
from droidspeak.integrations.server.daemon import Daemon
from droidspeak.integrations.server.wire import DTYPES, Command, Description, Request

from .wireclient import WireClient

DATA = Path(__file__).parents[1] / "data"
MAKER = Path(__file__).with_name("wire_golden.py")
NAMES = sorted(path.stem for path in DATA.glob("lm-wire-*.bin"))


def messages(name: str) -> tuple[list[tuple[dict[str, Any], bytes]], list[tuple[dict[str, Any], bytes]]]:
    """Requests and replies, each as what it says and its bytes."""
    said, data = json.loads((DATA / f"{name}.json").read_text()), (DATA / f"{name}.bin").read_bytes()
    split = len(said["requests"]) * wire.REQUEST.size
    return _cut(said["requests"], data[:split], 186), _cut(said["replies"], data[split:], 36)


def _cut(said: list[dict[str, Any]], data: bytes, size: int) -> list[tuple[dict[str, Any], bytes]]:
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return list(zip(said, parts, strict=True))


def padded(said: dict[str, Any]) -> tuple[int, ...]:
    return (*said["shape"], 0, 0, 0, 0)[:4]


def dtype_of(said: dict[str, Any]) -> torch.dtype | None:
    return getattr(torch, said["dtype"]) if said["dtype"] else None


def test_the_files_are_there():
    assert NAMES == ["lm-wire-0.5.6"]
    assert (wire.REQUEST.size, wire.REPLY.size) == (186, 36)


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_read_as_lmcache_wrote_them(name):
    requests, _ = messages(name)
    for said, data in requests:
        request = Request.parse(data, max_object=1 << 20)
        assert request.command is Command[said["command"]]
        assert request.key == said["key"].encode()
        assert request.length == said["length"]
        assert request.description.fmt == said["fmt"]
        assert DTYPES[request.description.dtype] == dtype_of(said)
        assert request.description.shape == padded(said)
        assert request.fault is None, said


@pytest.mark.parametrize("name", NAMES)
def test_replies_are_the_bytes_that_lmcache_writes(name):
    _, replies = messages(name)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for said, data in replies:
        shape = tuple(padded(said))
        description = Description(said["fmt"], codes[dtype_of(said)], shape)
        assert wire.reply(said["code"], said["length"], description) == data, said
    assert [data for _, data in replies[:2]] == [wire.MISS, wire.HIT]


@pytest.mark.parametrize("name", NAMES)
def test_a_daemon_answers_in_the_same_bytes(name):
    requests, replies = messages(name)
    puts = [(said, data) for said, data in requests if said["command"] == "PUT"]
    hits = [data for said, data in replies if said["length"]]
    section = {"listen": "127.0.0.1:0", "http": None}
    settings = load_settings(overrides={"tiers": ["cpu://?capacity=16MiB"], "server": section})
    with Daemon(settings) as daemon, WireClient(daemon.ports["lm"]) as client:
        for number, ((said, put), hit) in enumerate(zip(puts, hits, strict=True)):
            body = bytes((number + i) % 256 for i in range(said["length"]))
            get = wire.REQUEST.pack(Command.GET, 0, 1, 2, 0, 0, 0, 0, 0, said["key"].encode().ljust(150))
            client.send(get)
            assert client.receive(36) == wire.MISS
            client.send(put + body + get)
            assert client.receive(36 + len(body)) == hit + body, said


@pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="needs lmcache")
def test_lmcache_still_writes_these_bytes(tmp_path):
    name = f"lm-wire-{importlib.metadata.version('lmcache')}"
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, MAKER, tmp_path], check=True, env=environment, capture_output=True)
    for suffix in (".bin", ".json"):
        assert (tmp_path / (name + suffix)).read_bytes() == (DATA / (name + suffix)).read_bytes()
