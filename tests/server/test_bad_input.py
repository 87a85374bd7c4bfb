"""Malformed input over real sockets: each row of docs/server.md's table.

Behind each test the daemon serves on, what was stored before reads back as it was, nothing else is stored,
and the counter that the table names went up (`attacked`).
"""

from __future__ import annotations

import ast
import random
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from droidspeak.config import load_settings
from droidspeak.integrations.server.daemon import Daemon

from .certificates import self_signed
from .wireclient import (
    BFLOAT16,
    BINARY,
    EXIST,
    GET,
    HEALTH,
    HIT,
    KV_T2D,
    LIST,
    MISS,
    PUT,
    REPLY,
    REQUEST,
    UINT8,
    WireClient,
    daemon_process,
    frame,
    put_frame,
    wait_until,
)

MIB = 1 << 20
MAX_OBJECT = 8 * MIB
TABLE = Path(__file__).parents[2] / "docs" / "server.md"
WITNESS, KEPT = b"witness@1@0@abc@bfloat16", bytes(range(256)) * 16
NAME = b"victim@1@0@1f@bfloat16"
BODY = bytes(range(64))


def garbage(seed: int) -> bytes:
    return random.Random(seed).randbytes(4096)


def put_as(key: bytes = NAME, body: bytes = BODY, **fields: Any) -> bytes:
    return frame(PUT, key, **{"length": len(body), "dtype": UINT8, "shape": (2, 1, 1, 32), **fields}) + body


# After these the connection is closed: row -> reason, and what is sent.
CLOSING: dict[str, tuple[str, list[bytes]]] = {
    "unknown-command": ("bad_command", [frame(command) for command in (0, 6, -1, 2**31 - 1, -(2**31))]),
    "list": ("bad_command", [frame(LIST)]),
    "negative-length": ("bad_length", [put_as(length=-1), put_as(length=-(2**31))]),
    "huge-length": ("bad_length", [put_as(length=MAX_OBJECT + 1), put_as(length=2**31 - 1)]),
    "length-where-nothing-follows": (
        "bad_length",
        [frame(command, NAME, length=64) + BODY for command in (GET, EXIST, HEALTH)],
    ),
    "garbage": ("bad_command", [garbage(seed) for seed in range(8)]),
    "http-on-the-lm-port": ("bad_command", [b"GET / HTTP/1.1\r\nHost: x\r\n".ljust(186, b"\n") + b"\r\n"]),
    "half-a-header": ("cut_short", [frame(GET, NAME)[:count] for count in (1, 4, 36, 185)]),
}

_KEYLESS = {
    "empty-key": b"",
    "blank-key": b" " * 150,
    "key-not-utf8": b"m@1@0@\xff\xfe@half",
    "key-cut-in-a-letter": ("x" * 149 + "é").encode()[:150],
    "key-that-may-be-cut": ("x" * 148 + "é").encode(),
    "key-with-control-characters": b"m\x00@1@0@1f@half\n",
}

# These are consumed, nothing is stored, and the connection goes on.
REFUSED: dict[str, tuple[str, list[bytes]]] = {
    **{row: ("bad_key", [put_as(key), frame(GET, key), frame(EXIST, key)]) for row, key in _KEYLESS.items()},
    "unknown-dtype": ("bad_format", [put_as(dtype=dtype) for dtype in (-1, 9, 2**31 - 1)]),
    "unknown-fmt": ("bad_format", [put_as(fmt=fmt) for fmt in (-1, 9, 2**31 - 1)]),
    "tensor-without-dtype": ("bad_format", [put_as(dtype=0)]),
    "shape-and-length-differ": (
        "bad_shape",
        [
            put_as(shape=(2, 32, 256, 1024)),
            put_as(shape=(2, 1, 1, 31)),
            put_as(dtype=BFLOAT16),
            put_as(fmt=KV_T2D, shape=(63,)),
            put_as(shape=(2**31 - 1,) * 4),
        ],
    ),
    "negative-dimension": ("bad_shape", [put_as(shape=(-2, -1, 1, 32)), put_as(shape=(64, 1, 1, -1))]),
    "zero-inside-the-shape": ("bad_shape", [put_as(shape=(2, 0, 32)), put_as(shape=(0, 0, 0, 64))]),
    "empty-object": ("bad_shape", [put_as(body=b"", shape=()), put_as(body=b"", shape=(2, 0, 1, 1))]),
    "binary-of-another-shape": (
        "bad_shape",
        [put_as(fmt=BINARY, shape=(2, 32)), put_as(fmt=BINARY, shape=(65,)), put_as(fmt=BINARY, shape=())],
    ),
}

# The rows that take a test of their own: what is counted.
SINGLE = {
    "test_put_cut_at_every_byte": ("closed", "cut_short"),
    "test_half_headers_from_500_connections": ("closed", "header_timeout"),
    "test_sender_that_stops": ("closed", "stalled"),
    "test_reader_that_stops": ("closed", "stalled"),
    "test_silence_between_requests": ("closed", "idle"),
    "test_more_connections_than_allowed": ("closed", "too_many"),
    "test_more_bytes_under_way_than_allowed": ("refused", "over_budget"),
    "test_tls_hello_on_the_plain_port": ("closed", "bad_command"),
    "test_plain_bytes_on_the_tls_port": ("closed", "bad_tls"),
    "test_no_handshake_on_the_tls_port": ("closed", "header_timeout"),
    "test_spellings_are_keys_of_their_own": ("requests", "get"),
    "test_trailing_blanks_are_padding": ("requests", "get"),
    "test_health_with_any_key": ("requests", "health"),
}

ROWS = {
    **{f"test_closes[{row}]": ("closed", reason) for row, (reason, _) in CLOSING.items()},
    **{f"test_refused[{row}]": ("refused", reason) for row, (reason, _) in REFUSED.items()},
    **SINGLE,
}


def serve(folder: Path, **server: Any) -> Daemon:
    """A daemon on free ports, without HTTP; memory over disk."""
    tiers = ["cpu://?capacity=64MiB", f"disk://{folder}/store?capacity=256MiB&min_free=0"]
    patient = {"header_timeout": 60, "stall_timeout": 60, "drain_timeout": 60}
    section = {"listen": "127.0.0.1:0", "http": None, "max_object": MAX_OBJECT, **patient, **server}
    return Daemon(load_settings(overrides={"tiers": tiers, "server": section}))


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> Iterator[Daemon]:
    """Its deadlines are never reached."""
    with serve(tmp_path_factory.mktemp("patient")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def hasty(tmp_path_factory) -> Iterator[Daemon]:
    """Whoever does nothing for long is thrown out."""
    with serve(tmp_path_factory.mktemp("hasty"), header_timeout=0.5, stall_timeout=0.5) as daemon:
        yield daemon


@pytest.fixture
def attacked(request, patient) -> Iterator[Daemon]:
    yield from _survives(request, patient)


@pytest.fixture
def attacked_hasty(request, hasty) -> Iterator[Daemon]:
    yield from _survives(request, hasty)


def _survives(request, daemon: Daemon) -> Iterator[Daemon]:
    """What holds around every row."""
    with WireClient(daemon.ports["lm"]) as client:
        client.put(WITNESS, KEPT)
        assert client.exist(WITNESS)
        counted, held = ROWS[request.node.name], _held(daemon)
        before = daemon.state.counters.get(*counted)
        yield daemon
        wait_until(lambda: daemon.state.counters.get(*counted) > before, str(counted))
        if request.node.name not in WRITERS:
            assert _held(daemon) == held
        wait_until(lambda: daemon.state.connections() == 1, "connections end")
        wait_until(lambda: daemon.state.in_flight() == 0, "bytes are given back")
    with WireClient(daemon.ports["lm"]) as client:
        assert client.get(WITNESS) == KEPT


# These store valid objects as well.
WRITERS = {name for name in SINGLE if name not in ("test_silence_between_requests",)}


def _held(daemon: Daemon) -> set[str]:
    return {str(key) for key in daemon.state.stores[""].keys()}  # noqa: SIM118


@pytest.mark.parametrize("row", CLOSING)
def test_closes(attacked, row):
    reason, streams = CLOSING[row]
    for stream in streams:
        with WireClient(attacked.ports["lm"]) as client:
            before = attacked.state.counters.get("closed", reason)
            client.send(frame(EXIST, WITNESS) + stream)
            assert client.reply() == HIT
            if reason == "cut_short":
                assert client.end() == b""
            assert client.is_closed()
            wait_until(lambda: attacked.state.counters.get("closed", reason) == before + 1, reason)  # noqa: B023


@pytest.mark.parametrize("row", REFUSED)
def test_refused(attacked, row):
    reason, streams = REFUSED[row]
    before = attacked.state.counters.get("refused", reason)
    with WireClient(attacked.ports["lm"]) as client:
        for stream in streams:
            client.send(stream + frame(EXIST, NAME) + frame(GET, WITNESS))
            if REQUEST.unpack_from(stream)[0] != PUT:
                assert client.reply() == MISS
            assert client.reply() == MISS
            assert client.reply().length == len(KEPT)
            assert client.receive(len(KEPT)) == KEPT
    assert attacked.state.counters.get("refused", reason) == before + len(streams)


def test_put_cut_at_every_byte(attacked):
    old, stream = b"old value", put_frame(NAME, BODY)
    with WireClient(attacked.ports["lm"]) as witness:
        witness.put(NAME, old)
        assert witness.exist(NAME)
        before = attacked.state.counters.get("closed", "cut_short")
        for count in range(1, len(stream)):
            with WireClient(attacked.ports["lm"]) as client:
                client.send(stream[:count])
                assert client.end() == b""
            assert witness.get(NAME) == old, f"cut after {count} bytes"
        wait_until(lambda: attacked.state.counters.get("closed", "cut_short") == before + len(stream) - 1)
        witness.send(stream)
        assert witness.get(NAME) == BODY


def test_half_headers_from_500_connections(attacked_hasty):
    half = frame(GET, WITNESS)[:93]
    before = attacked_hasty.state.counters.get("closed", "header_timeout")
    clients = [WireClient(attacked_hasty.ports["lm"]) for _ in range(500)]
    try:
        for client in clients:
            client.send(half)
        with WireClient(attacked_hasty.ports["lm"]) as other:
            assert other.get(WITNESS) == KEPT
        assert all(client.is_closed() for client in clients)
    finally:
        for client in clients:
            client.close()
    wait_until(lambda: attacked_hasty.state.counters.get("closed", "header_timeout") == before + 500)


def test_sender_that_stops(attacked_hasty):
    with WireClient(attacked_hasty.ports["lm"]) as client:
        client.put(NAME, BODY)
        client.send(put_frame(NAME, KEPT)[:-1])
        assert client.is_closed()
    with WireClient(attacked_hasty.ports["lm"]) as client:
        assert client.get(NAME) == BODY


def test_reader_that_stops(attacked_hasty):
    body = random.Random(1).randbytes(MAX_OBJECT)
    with WireClient(attacked_hasty.ports["lm"], receive_buffer=4096) as client:
        client.put(NAME, body)
        assert client.exist(NAME)
        before = attacked_hasty.state.counters.get("closed", "stalled")
        client.send(8 * frame(GET, NAME))
        wait_until(lambda: attacked_hasty.state.counters.get("closed", "stalled") == before + 1)
    with WireClient(attacked_hasty.ports["lm"]) as client:
        assert client.get(NAME) == body


@pytest.fixture
def attacked_idle(request, tmp_path) -> Iterator[Daemon]:
    with serve(tmp_path, idle_timeout=0.5) as daemon:
        with WireClient(daemon.ports["lm"]) as client:
            client.put(WITNESS, KEPT)
            assert client.exist(WITNESS)
        yield daemon
        assert daemon.state.counters.get(*ROWS[request.node.name]) > 0
        with WireClient(daemon.ports["lm"]) as client:
            assert client.get(WITNESS) == KEPT


def test_silence_between_requests(attacked_idle):
    with WireClient(attacked_idle.ports["lm"]) as client:
        assert client.health() == HIT
        assert client.is_closed()


def test_more_connections_than_allowed(tmp_path):
    with serve(tmp_path, max_connections=2) as daemon:
        with WireClient(daemon.ports["lm"]) as first, WireClient(daemon.ports["lm"]) as second:
            first.put(WITNESS, KEPT)
            assert first.health() == second.health() == HIT
            with WireClient(daemon.ports["lm"]) as third:
                assert third.is_closed()
            assert second.get(WITNESS) == KEPT
            assert daemon.state.counters.get(*SINGLE["test_more_connections_than_allowed"]) == 1
        wait_until(lambda: daemon.state.connections() == 0)
        with WireClient(daemon.ports["lm"]) as fourth:
            assert fourth.get(WITNESS) == KEPT


def test_more_bytes_under_way_than_allowed(tmp_path):
    counted = SINGLE["test_more_bytes_under_way_than_allowed"]
    with serve(tmp_path, in_flight=MAX_OBJECT, stall_timeout=2) as daemon:
        with WireClient(daemon.ports["lm"]) as greedy, WireClient(daemon.ports["lm"]) as modest:
            modest.put(WITNESS, KEPT)
            assert modest.exist(WITNESS)
            greedy.send(frame(PUT, NAME, length=MAX_OBJECT, dtype=UINT8, shape=(MAX_OBJECT,)))
            wait_until(lambda: daemon.state.in_flight() == MAX_OBJECT)
            modest.send(put_frame(NAME, BODY) + frame(EXIST, NAME) + frame(EXIST, WITNESS))
            while not daemon.state.counters.get(*counted):
                greedy.send(b"drip")
                time.sleep(0.05)
            assert [modest.reply(), modest.reply()] == [MISS, HIT]
        wait_until(lambda: daemon.state.in_flight() == 0)
        with WireClient(daemon.ports["lm"]) as client:
            assert client.get(WITNESS) == KEPT


def test_the_largest_object_fits_in_the_smallest_budget(tmp_path):
    body = random.Random(2).randbytes(64 << 10)
    with serve(tmp_path, max_object=len(body), in_flight=len(body)) as daemon:
        with WireClient(daemon.ports["lm"]) as client:
            client.put(NAME, body)
            assert client.get(NAME) == body
        wait_until(lambda: daemon.state.in_flight() == 0)


def test_tls_hello_on_the_plain_port(attacked):
    context = ssl.create_default_context()
    with WireClient(attacked.ports["lm"]) as client, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(client.socket, server_hostname="127.0.0.1")


@pytest.fixture
def attacked_tls(request, tmp_path) -> Iterator[tuple[Daemon, ssl.SSLContext]]:
    certificate, key = self_signed(tmp_path)
    context = ssl.create_default_context(cafile=str(certificate))
    tls = {"certificate": str(certificate), "key": str(key)}
    with serve(tmp_path, tls=tls, header_timeout=2) as daemon:
        with _tls_client(daemon, context) as client:
            client.put(WITNESS, KEPT)
            assert client.exist(WITNESS)
        yield daemon, context
        wait_until(lambda: daemon.state.counters.get(*ROWS[request.node.name]) > 0)
        with _tls_client(daemon, context) as client:
            assert client.get(WITNESS) == KEPT


def _tls_client(daemon: Daemon, context: ssl.SSLContext) -> WireClient:
    client = WireClient(daemon.ports["lm"])
    client.socket = context.wrap_socket(client.socket, server_hostname="127.0.0.1")
    return client


def test_plain_bytes_on_the_tls_port(attacked_tls):
    daemon, _ = attacked_tls
    with WireClient(daemon.ports["lm"]) as client:
        client.send(frame(GET, WITNESS))
        assert REPLY.pack(*HIT)[:4] not in client.end()


def test_no_handshake_on_the_tls_port(attacked_tls):
    daemon, context = attacked_tls
    with WireClient(daemon.ports["lm"]) as silent:
        with _tls_client(daemon, context) as client:
            assert client.get(WITNESS) == KEPT
        assert silent.is_closed()


def test_spellings_are_keys_of_their_own(attacked):
    spellings = [b"s@1@0@%s@half" % text for text in (b"1f", b"1F", b"0x1f", b"+1f", b"01f", b"-1f", b" 1f")]
    spellings += [b" s@1@0@1f@half", b"s@01@0@1f@half", b"s@1@+0@1f@half", b"S@1@0@1f@half"]
    spellings += ["é@1@0@1f@half".encode(), "e\N{COMBINING ACUTE ACCENT}@1@0@1f@half".encode()]
    with WireClient(attacked.ports["lm"]) as client:
        assert not any(client.exist(key) for key in spellings)
        for number, key in enumerate(spellings):
            client.put(key, b"%d of its own" % number)
        for number, key in enumerate(spellings):
            assert client.get(key) == b"%d of its own" % number


def test_trailing_blanks_are_padding(attacked):
    key = b"padded@1@0@1f@half"
    with WireClient(attacked.ports["lm"]) as client:
        client.put(key, BODY)
        assert client.get(key + b"  ") == BODY
        assert client.get(key + b"\t") is None


def test_health_with_any_key(attacked):
    with WireClient(attacked.ports["lm"]) as client:
        for key in _KEYLESS.values():
            client.send(frame(HEALTH, key))
            assert client.reply() == HIT


def test_malformed_input_takes_no_memory(tmp_path):
    """Rows again and again, then what is long: neither what was sent nor what was announced is kept."""
    rows = [stream for _, streams in (*CLOSING.values(), *REFUSED.values()) for stream in streams]
    tiers = ("--tier", "cpu://?capacity=16MiB", "--no-http", "--log-level", "warning")
    with daemon_process(*tiers) as daemon:
        with WireClient(daemon.port) as client:
            client.put(WITNESS, KEPT)
            assert client.exist(WITNESS)
        for _ in range(3):
            _send_all(daemon.port, rows)
        settled = daemon.memory()
        for _ in range(20):
            _send_all(daemon.port, rows)
        assert daemon.memory() - settled < 8 * MIB
        refused = frame(PUT, NAME, length=256 * MIB, dtype=UINT8, shape=(256 * MIB - 1,))
        announced = frame(PUT, NAME, length=256 * MIB, dtype=UINT8, shape=(256 * MIB,))
        with WireClient(daemon.port) as client:
            client.send(refused)
            for _ in range(256):
                client.send(bytes(MIB))
            assert not client.exist(NAME)
        assert daemon.memory("VmHWM") - settled < 16 * MIB
        for _ in range(5):
            with WireClient(daemon.port) as client:
                client.send(announced + bytes(16 * MIB))
                assert client.end() == b""
        assert daemon.memory() - settled < 16 * MIB
        with WireClient(daemon.port) as client:
            assert client.get(WITNESS) == KEPT


def _send_all(port: int, streams: list[bytes]) -> None:
    for stream in streams:
        with WireClient(port) as client:
            client.send(stream)
            client.end()


def test_the_table_in_the_docs_names_these_tests():
    rows = _documented()
    here = {test: counted for file, test, counted in rows if file == Path(__file__).name}
    assert here == {test: f"{counter} {label}" for test, (counter, label) in ROWS.items()}
    assert len(here) == len([row for row in rows if row[0] == Path(__file__).name])
    for file, test, _ in rows:
        tree = ast.parse((Path(__file__).parent / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test.partition("[")[0] in functions, f"{file} has no {test}"


def _documented() -> list[tuple[str, str, str]]:
    """File, test and what is counted, of each row of the table."""
    section = TABLE.read_text().split("## What malformed input gets", 1)[1].split("\n## ", 1)[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    rows = []
    for *_, counted, test in cells:
        named = re.fullmatch(r"`(test_\w+\.py)::(test_[\w\[\]-]+)`", test.strip())
        assert named, f"{test!r} is not a test"
        rows.append((named[1], named[2], counted.strip().strip("`")))
    return rows
