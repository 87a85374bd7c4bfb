"""What a real daemon process keeps, however it ends, and how it starts again."""

from __future__ import annotations

import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from droidspeak.config import load_settings
from droidspeak.integrations.server.daemon import Daemon

from .wireclient import PUT, UINT8, WireClient, daemon_process, frame, put_frame, wait_until

KIB = 1 << 10


def tiers(folder: Path) -> list[str]:
    return [
        *("--tier", "cpu://?capacity=32MiB"),
        *("--tier", f"disk://{folder}/store?min_free=0"),
        *("--no-http", "--log-level", "warning"),
    ]


@contextmanager
def started_again(folder: Path, port: int = 0) -> Iterator[WireClient]:
    """A client of a daemon over the store that a process has left; in this process, to save time."""
    with in_process(folder, port) as daemon, WireClient(daemon.ports["lm"]) as client:
        yield client


def in_process(folder: Path, port: int = 0, **server: Any) -> Daemon:
    tiers = ["cpu://?capacity=32MiB", f"disk://{folder}/store?min_free=0"]
    section = {"listen": f"127.0.0.1:{port}", "http": None, **server}
    return Daemon(load_settings(overrides={"tiers": tiers, "server": section}))


def key(number: int) -> bytes:
    return b"m@1@0@%x@bfloat16" % number


def body(number: int, version: int = 0) -> bytes:
    return random.Random(f"{number}.{version}").randbytes(16 * KIB + number)


class Writer(threading.Thread):
    """Puts objects of its own, asks for each, and notes those that were acknowledged, until the end."""

    def __init__(self, port: int, first: int) -> None:
        super().__init__()
        self._port, self._first = port, first
        self.acknowledged: dict[int, int] = {}
        self.tried: dict[int, int] = {}

    def run(self) -> None:
        try:
            with WireClient(self._port) as client:
                for turn in range(100_000):
                    # Every third PUT replaces an object that was acknowledged before.
                    number, version = self._first + (turn - turn % 3 // 2), turn % 3 // 2
                    self.tried[number] = version
                    client.put(key(number), body(number, version))
                    if client.exist(key(number)):
                        self.acknowledged[number] = version
        except (OSError, EOFError):
            return


@pytest.mark.parametrize("least", [1, 60])
def test_what_was_acknowledged_survives_kill_9(tmp_path, least):
    with daemon_process(*tiers(tmp_path)) as daemon:
        writers = [Writer(daemon.port, 1000 * number) for number in range(3)]
        for writer in writers:
            writer.start()
        wait_until(lambda: all(len(writer.acknowledged) >= least for writer in writers))
        daemon.kill()
        for writer in writers:
            writer.join()
    with started_again(tmp_path) as client:
        for writer in writers:
            for number, tried in writer.tried.items():
                _is_one_of(client.get(key(number)), number, writer.acknowledged.get(number), tried)


def _is_one_of(found: bytes | None, number: int, acknowledged: int | None, tried: int) -> None:
    """The acknowledged version or the one that was on its way; nothing only if none was acknowledged."""
    allowed = [body(number, version) for version in {acknowledged, tried} - {None}]
    assert found in (allowed if acknowledged is not None else [*allowed, None]), f"object {number}"


@pytest.mark.parametrize(("mode", "answer"), [("durable", False), ("memory", True)])
def test_exist_of_what_only_memory_holds(tmp_path, mode, answer):
    (tmp_path / "store").write_text("a file where the disk tier's folder should be")
    with in_process(tmp_path, acknowledge=mode) as daemon, WireClient(daemon.ports["lm"]) as client:
        client.put(key(1), body(1))
        assert client.exist(key(1)) is answer
        assert client.get(key(1)) == body(1)


def test_restart_on_the_same_port_at_once(tmp_path):
    """The daemon closes first, so its end of the connections lingers in TIME_WAIT."""
    with daemon_process(*tiers(tmp_path)) as daemon:
        port = daemon.port
        clients = [WireClient(port) for _ in range(20)]
        for number, client in enumerate(clients):
            client.put(key(number), body(number))
            assert client.exist(key(number))
        daemon.terminate()
        assert daemon.wait() == 0
        assert all(client.is_closed() for client in clients)
        for client in clients:
            client.close()
    with started_again(tmp_path, port) as client:
        assert [client.get(key(number)) for number in range(20)] == [body(number) for number in range(20)]


def test_sigterm_keeps_what_nobody_asked_for(tmp_path):
    """PUTs that have arrived whole at SIGTERM are on the disk after it, though none was acknowledged.

    The daemon is stopped meanwhile, so that it has read none of them.
    """
    with daemon_process(*tiers(tmp_path)) as daemon:
        clients = [WireClient(daemon.port) for _ in range(3)]
        for client in clients:
            client.health()
        daemon.process.send_signal(signal.SIGSTOP)
        for number in range(30):
            clients[number % 3].put(key(number), body(number)[:2048])
        daemon.terminate()
        daemon.process.send_signal(signal.SIGCONT)
        assert daemon.wait() == 0
        for client in clients:
            client.close()
    with started_again(tmp_path) as client:
        assert [n for n in range(30) if client.get(key(n)) != body(n)[:2048]] == []


def test_sigterm_lets_a_put_end(tmp_path):
    """A request that is under way at SIGTERM is finished; then the connection ends."""
    stream = put_frame(key(1), body(1))
    with daemon_process(*tiers(tmp_path)) as daemon:
        with WireClient(daemon.port) as client:
            client.send(stream[:5000])
            wait_until(lambda: _received(client) == 0, "the first part is read")
            daemon.terminate()
            _wait_for_refusal(daemon.port)
            client.send(stream[5000:])
            assert client.is_closed()
        assert daemon.wait() == 0
    with started_again(tmp_path) as client:
        assert client.get(key(1)) == body(1)


def _received(client: WireClient) -> int:
    """Bytes that the daemon's end of the connection has not read yet (the kernel's table)."""
    local, peer = client.socket.getsockname()[1], client.socket.getpeername()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (fields[1][-4:], fields[2][-4:]) == (f"{peer:04X}", f"{local:04X}"):
            return int(fields[4].partition(":")[2], 16)
    return -1


def _wait_for_refusal(port: int) -> None:
    """Until nothing listens at `port`."""

    def refused() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return True
        return False

    wait_until(refused, "the daemon accepts no more")


def test_second_sigterm_ends_at_once(tmp_path):
    arguments = ["--set", "server.drain_timeout=3600", "--set", "server.stall_timeout=3600"]
    with daemon_process(*tiers(tmp_path), *arguments) as daemon, WireClient(daemon.port) as client:
        client.put(key(1), body(1))
        assert client.exist(key(1))
        client.send(frame(PUT, key(2), length=100, dtype=UINT8, shape=(100,)) + b"not all")
        daemon.terminate()
        _wait_for_refusal(daemon.port)
        assert daemon.process.poll() is None
        daemon.terminate()
        assert daemon.wait() == -signal.SIGTERM
    with started_again(tmp_path) as client:
        assert client.get(key(1)) == body(1)
        assert client.get(key(2)) is None


def test_connections_that_do_not_end_are_broken_off(tmp_path):
    with (
        daemon_process(*tiers(tmp_path), "--set", "server.drain_timeout=0.2") as daemon,
        WireClient(daemon.port) as client,
    ):
        client.send(put_frame(key(1), body(1))[:-1])
        daemon.terminate()
        assert daemon.wait() == 0


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_service_manager_is_told(tmp_path, abstract):
    address = f"droidspeak-test-{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(60)
        manager.bind(f"\0{address}" if abstract else address)
        environment = {"NOTIFY_SOCKET": f"@{address}" if abstract else address}
        with daemon_process(*tiers(tmp_path), environment=environment) as daemon:
            assert b"READY=1" in manager.recv(4096).split(b"\n")
            with WireClient(daemon.port) as client:
                assert client.health().code == 200
            daemon.terminate()
            assert b"STOPPING=1" in manager.recv(4096).split(b"\n")
            assert daemon.wait() == 0
