"""What a client may not do to the daemon: odd paths, odd lengths, stalling, crowding; and its end."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from droidspeak.config import Address, load_settings
from droidspeak.errors import ConfigError
from droidspeak.integrations.server.http import HttpServer
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage.testing import make_chunk, make_key

from .httpclient import (
    MIB,
    Serving,
    answer_on,
    connection,
    disk,
    is_closed,
    memory,
    path_of,
    say,
    serving,
    store_of,
)
from .wireclient import wait_until

CHUNK = make_chunk(1)
KEY = path_of(CHUNK.key)
SOURCE, SHARD, PREFIX = str(CHUNK.key).split("/")
# 16 MiB: more than any socket's buffers take.
LARGE = make_chunk(2, layers=64, e_layers=(), tokens=8192)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Serving]:
    """Patient; a disk that holds `CHUNK` beside a file that is none of its business."""
    folder = tmp_path_factory.mktemp("bounds")
    (folder / "secret").write_text("tell nobody")
    with serving(store_of(memory(), disk(folder / "store"))) as served:
        served.client.put(CHUNK)
        assert served.store.flush()
        yield served


@pytest.fixture
def hasty() -> Iterator[Serving]:
    """Stalls for half a second are too long."""
    with serving(store_of(memory()), stall_timeout=0.5, header_timeout=0.5) as served:
        served.client.put(CHUNK)
        yield served
        # Whatever was done to it, it serves on and holds nothing.
        wait_until(lambda: served.state.budget.held == 0, "the budget is free")
        assert served.client.ask("GET", KEY).body == CHUNK.to_bytes()


def put_head(length: int | str) -> bytes:
    return f"PUT {KEY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


# Paths

ODD_PATHS = {
    "dots": "/v1/chunks/../../../secret",
    "coded-dots": "/v1/chunks/%2e%2e/%2e%2e/%2e%2e/secret",
    "dots-in-parts": "/v1/chunks/../../secret",
    "coded-slashes": f"/v1/chunks/{SOURCE}%2f{SHARD}%2f{PREFIX}/x",
    "backslashes": "/v1/chunks/..%5c..%5csecret/0of1/x",
    "nul": f"{KEY}%00",
    "nul-in-the-middle": f"/v1/chunks/{SOURCE}/0of1%00/{PREFIX}",
    "newline": f"{KEY}%0a",
    "absolute": "/v1/chunks//etc/passwd",
    "long": "/v1/chunks/" + "a" * 60_000,
    "long-part": f"/v1/chunks/{SOURCE}/{SHARD}/{'b' * 30_000}",
    "unicode": "/v1/chunks/%e2%80%ae/0of1/%f0%9f%92%a3",
    "not-utf8": f"/v1/chunks/%ff%fe/0of1/{PREFIX}",
    "upper-case": f"/v1/chunks/{SOURCE.upper()}/{SHARD}/{PREFIX}",
    "other-digits": f"/v1/chunks/{SOURCE}/%d9%a0of1/{PREFIX}",
    "long-shard": f"/v1/chunks/{SOURCE}/00000of1/{PREFIX}",
    "trailing-slash": f"{KEY}/",
    "short-digest": f"/v1/chunks/{SOURCE[:-1]}/{SHARD}/{PREFIX}",
    "half-an-escape": f"/v1/chunks/{SOURCE}/{SHARD}/%6",
}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("case", list(ODD_PATHS))
def test_odd_paths_name_nothing(served, case, method):
    answer = say(served.server.port, f"{method} {ODD_PATHS[case]} HTTP/1.1", "Content-Length: 0")
    assert answer.refusal in [(404, "not_found"), (422, "bad_request")]
    assert b"tell nobody" not in answer.body
    assert list(served.store.keys()) == [CHUNK.key]


@pytest.mark.parametrize("path", ["*", "http://127.0.0.1/v1/usage", "/v1/usage#x", "/v1/usage?tenant=%ff"])
def test_odd_targets_are_answered(served, path):
    assert say(served.server.port, f"GET {path} HTTP/1.1").status in (200, 400, 404)


def test_other_methods_are_told_what_is_allowed(served):
    for method, path in [
        ("PATCH", KEY),
        ("OPTIONS", "/v1/usage"),
        ("POST", "/healthz"),
        ("BREW", "/v1/usage"),
    ]:
        answer = say(served.server.port, f"{method} {path} HTTP/1.1")
        if method == "BREW":
            assert answer.status == 400
            continue
        assert answer.refusal == (405, "bad_request")
        assert answer.headers["Allow"]


def test_an_upgrade_is_ignored(served):
    answer = say(served.server.port, "GET /healthz HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket")
    assert answer.status == 200


# Lengths


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("-1", 400),
        ("1e3", 400),
        ("9" * 30, 400),
        ("+5", 400),
        ("0x10", 400),
        (str(2**62), 413),
        (str(1 << 40), 413),
    ],
)
def test_odd_lengths(served, length, expected):
    with connection(served.server.port) as plain:
        plain.sendall(put_head(length))
        assert answer_on(plain).status == expected
        # The body is not waited for.
        assert is_closed(plain)
    assert served.state.budget.held == 0


def test_no_length(served):
    assert say(served.server.port, f"PUT {KEY} HTTP/1.1").refusal == (411, "bad_request")
    # Where no body is meant, none need be named.
    for method, path in [("PUT", f"{KEY}/pin"), ("DELETE", f"{KEY}/pin"), ("POST", f"{KEY}/verify")]:
        assert say(served.server.port, f"{method} {path} HTTP/1.1").status in (200, 204)
    chunked = say(served.server.port, f"PUT {KEY} HTTP/1.1", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n")
    assert chunked.refusal == (411, "bad_request")
    chunked = say(
        served.server.port,
        "POST /v1/leading HTTP/1.1",
        "Transfer-Encoding: chunked",
        "Content-Type: application/json",
        body=b"d\r\n" + b'{"keys": []}x',
    )
    assert chunked.refusal == (411, "bad_request")


def test_two_lengths(served):
    """A smuggler's request: both headers, or two lengths that differ."""
    for extra in ("Transfer-Encoding: chunked", "Content-Length: 6"):
        answer = say(
            served.server.port, f"PUT {KEY} HTTP/1.1", "Content-Length: 5", extra, body=b"0\r\n\r\nx"
        )
        assert answer.status in (400, 411)
    assert served.client.ask("GET", KEY).body == CHUNK.to_bytes()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"keys": "x"}',
        b'{"keys": ["../../secret"]}',
        b'{"keys": [1]}',
        b'{"keys": [], "kyes": []}',
        b'{"\\ud800": 1, "keys": []}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"keys": [' + b",".join([b'"' + str(CHUNK.key).encode() + b'"'] * 4097) + b"]}",
    ],
    ids=range(12),
)
def test_json_that_is_not_what_was_asked_for(served, body):
    answer = served.client.ask("POST", "/v1/leading", body, {"Content-Type": "application/json"})
    assert answer.refusal in [(422, "bad_request"), (400, "bad_request")]


def test_a_header_that_never_ends(hasty):
    with connection(hasty.server.port) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\n")
        try:
            for line in range(4096):
                plain.sendall(b"X-%d: %s\r\n" % (line, b"x" * 1024))
        except OSError:
            pass
        assert is_closed(plain)
    assert hasty.events("closed", "header_too_large") == 1


# Stalling


def test_a_put_that_is_cut_short_changes_nothing(hasty):
    other = make_chunk(9, key=CHUNK.key).to_bytes()
    for sent in (0, 1, len(other) - 1):
        with connection(hasty.server.port) as plain:
            plain.sendall(
                f"PUT {KEY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(other)}\r\n\r\n".encode()
            )
            plain.sendall(other[:sent])
            wait_until(lambda: hasty.state.budget.held > 0, "the body is being received")
        wait_until(lambda: hasty.state.budget.held == 0, "it was given up")
        assert hasty.client.ask("GET", KEY).body == CHUNK.to_bytes()


def test_a_body_that_stalls_is_given_up(hasty):
    with connection(hasty.server.port) as plain:
        plain.sendall(put_head(100_000) + b"abc")
        assert answer_on(plain).refusal == (408, "timeout")
        assert is_closed(plain)
    assert hasty.events("refused", "timeout") == 1


def test_a_body_that_trickles_is_given_up(hasty):
    """A byte now and then holds memory as well as none does."""
    with connection(hasty.server.port) as plain:
        plain.sendall(put_head(100_000))
        plain.settimeout(0.02)
        for _byte in range(3000):
            plain.sendall(b"x")
            try:
                assert plain.recv(12) == b"HTTP/1.1 408"
                return
            except TimeoutError:
                continue
    pytest.fail("it may go on for ever")


def test_a_json_body_that_stalls_is_given_up(hasty):
    with connection(hasty.server.port) as plain:
        lines = ("POST /v1/leading HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        plain.sendall("\r\n".join((*lines, "Content-Length: 100", "", '{"keys')).encode())
        assert answer_on(plain).refusal == (408, "timeout")


def test_a_refused_body_that_stalls_ends_the_connection(hasty):
    with connection(hasty.server.port) as plain:
        plain.sendall(b"PUT /v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nabc")
        assert answer_on(plain).refusal == (404, "not_found")
        assert is_closed(plain)
    assert hasty.events("closed", "stalled") == 1


def test_a_refused_body_may_still_be_sent(served):
    """The connection goes on behind it."""
    with connection(served.server.port) as plain:
        body = bytes(2 * MIB)
        plain.sendall(
            f"PUT {KEY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        plain.sendall(body)
        assert answer_on(plain).refusal == (422, "not_a_chunk")
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_on(plain).status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
def test_a_request_that_does_not_come_to_its_end(hasty, sent):
    with connection(hasty.server.port) as plain:
        plain.sendall(sent)
        assert is_closed(plain)
    assert hasty.events("closed", "header_timeout") == 1


def test_blank_lines_are_no_request(hasty):
    with connection(hasty.server.port) as plain:
        for _request in range(2):
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer_on(plain).status == 200
            plain.sendall(b"\r\n")
        assert is_closed(plain)
    assert hasty.events("closed", "header_timeout") == 1


def slow_reader(plain: socket.socket) -> None:
    plain.sendall(f"GET {path_of(LARGE.key)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def test_a_reader_that_stalls_is_given_up(hasty):
    hasty.client.put(LARGE)
    with connection(hasty.server.port, receive_buffer=4096) as plain:
        slow_reader(plain)
        wait_until(lambda: hasty.state.budget.held > 0, "the answer is being sent")
        wait_until(lambda: hasty.state.budget.held == 0, "it was given up")
    assert hasty.events("closed", "stalled") == 1


def test_a_reader_that_is_slow_gets_everything():
    """In all it takes longer than a stall may last."""
    expected, received, pause = LARGE.to_bytes(), bytearray(), threading.Event()
    with serving(store_of(memory()), stall_timeout=2) as served:
        served.client.put(LARGE)
        with connection(served.server.port, receive_buffer=1 << 16) as plain:
            slow_reader(plain)
            response = http.client.HTTPResponse(plain)
            response.begin()
            while len(received) < len(expected):
                pause.wait(0.02)
                part = response.read(128 << 10)
                assert part, "broken off"
                received += part
        assert received == expected
        assert served.events("closed") == 0


def test_a_reader_that_leaves(hasty):
    hasty.client.put(LARGE)
    for _time in range(4):
        with connection(hasty.server.port, receive_buffer=4096) as plain:
            slow_reader(plain)
            wait_until(lambda: hasty.state.budget.held > 0, "the answer is being sent")
        wait_until(lambda: hasty.state.budget.held == 0, "it was given up")


# Crowds


def test_more_connections_than_allowed():
    with serving(store_of(memory()), max_connections=3) as served:
        with connection(served.server.port) as first, connection(served.server.port) as second:
            for plain in (first, second):
                plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert answer_on(plain).status == 200
            assert say(served.server.port, "GET /healthz HTTP/1.1").status == 503
        wait_until(lambda: served.events("ended") >= 3)
        assert say(served.server.port, "GET /healthz HTTP/1.1").status == 200


def test_requests_that_wait_for_the_budget_do_not_keep_others_waiting():
    with serving(store_of(memory()), in_flight=MIB, max_object=MIB) as served:
        served.client.put(CHUNK)
        served.state.budget.take(MIB, 1)
        with connection(served.server.port) as one:
            crowd = [socket.create_connection(("127.0.0.1", served.server.port)) for _ in range(60)]
            for plain in (one, *crowd):
                plain.sendall(f"GET {KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            wait_until(lambda: served.store.counters.get("hits") >= 61, "all have come")
            assert served.client.ask("GET", "/v1/usage").status == 200
            assert served.client.ask("GET", "/readyz").status == 200
            served.state.budget.give_back(MIB)
            for plain in (one, *crowd):
                assert answer_on(plain).body == CHUNK.to_bytes()
                plain.close()


WRITER = """
import sys
from pathlib import Path
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.testing import make_chunk, make_key

tier = DiskTier(Path(sys.argv[1]), min_free=0)
chunks = [make_chunk(seed, key=make_key(1), layers=8, tokens=256) for seed in (1, 2)]
print("ready", flush=True)
turn = 0
while True:
    tier.write(chunks[turn % 2])
    tier.delete(chunks[0].key)
    turn += 1
"""


def test_reads_while_another_process_writes_and_deletes(tmp_path):
    chunks = [make_chunk(seed, key=make_key(1), layers=8, tokens=256) for seed in (1, 2)]
    whole = {chunk.to_bytes() for chunk in chunks}
    tails = {data[-1000:] for data in whole}
    folder = tmp_path / "store"
    with serving(store_of(disk(folder))) as served:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True)
        try:
            assert writer.stdout.readline() == "ready\n"
            seen = {200: 0, 206: 0, 404: 0, 503: 0}

            def enough() -> bool:
                for headers, bodies in [({}, whole), ({"Range": "bytes=-1000"}, tails)]:
                    answer = served.client.ask("GET", path_of(chunks[0].key), headers=headers)
                    seen[answer.status] += 1
                    if answer.status in (200, 206):
                        assert answer.body in bodies
                    else:
                        # 503: replaced again and again while it was read.
                        assert answer.refusal in [(404, "not_found"), (503, "unavailable")]
                return min(seen[200], seen[206], seen[404]) >= 20

            wait_until(enough, f"reads with and without a chunk: {seen}")
            assert writer.poll() is None
        finally:
            writer.kill()
            writer.communicate()
        assert served.store.counters.get("corrupt") == 0


# Beginning and end


def test_readiness():
    with serving(store_of(memory())) as served:
        assert served.client.ask("GET", "/readyz").json == {"status": "ready"}
        served.state.ready.clear()
        assert served.client.ask("GET", "/readyz").refusal == (503, "unavailable")
        assert served.client.ask("GET", "/healthz").status == 200


def test_an_address_that_is_taken():
    state = DaemonState(load_settings(overrides={"tiers": ["cpu://"]}), {})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: Address already in use"):
            HttpServer(state, address).start()


def test_stopping_lets_requests_end_and_closes_idle_connections():
    with serving(store_of(memory())) as served:
        served.client.put(LARGE)
        with connection(served.server.port) as idle, connection(served.server.port) as busy:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer_on(idle).status == 200
            slow_reader(busy)
            wait_until(lambda: served.state.budget.held > 0, "the answer is being sent")
            stopping = threading.Thread(target=served.server.stop, args=(60,))
            stopping.start()
            assert is_closed(idle)
            assert answer_on(busy).body == LARGE.to_bytes()
            assert is_closed(busy)
            stopping.join(60)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", served.server.port))


def test_stopping_breaks_off_what_does_not_end():
    with serving(store_of(memory())) as served:
        served.client.put(LARGE)
        with connection(served.server.port, receive_buffer=4096) as plain:
            slow_reader(plain)
            wait_until(lambda: served.state.budget.held > 0, "the answer is being sent")
            served.server.stop(0.2)
            assert is_closed(plain)
        assert served.state.budget.held == 0
        name = f"droidspeak-http-{served.server.port}"
        assert name not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "httptools", "prometheus_client"])
def test_a_missing_package_is_named_by_its_extra(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from droidspeak.errors import MissingExtra
try:
    import droidspeak.integrations.server.http
except MissingExtra as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "HTTP side needs an optional part: pip install 'droidspeak[server]'\n"
