"""The daemon as a whole: tenants, TLS, the budget, draining, and its command line."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import sys
import threading
from importlib.metadata import distribution
from typing import Any

import boto3
import pytest

from droidspeak.config import load_settings
from droidspeak.errors import ConfigError
from droidspeak.integrations.server.daemon import Daemon

from .certificates import self_signed
from .wireclient import WireClient, daemon_process, frame, put_frame, wait_until

MIB = 1 << 20
KEY = b"org/model@1@0@1f@bfloat16"


def daemon(tiers: tuple[str, ...] = ("cpu://?capacity=32MiB",), **server: Any) -> Daemon:
    section = {"listen": "127.0.0.1:0", "http": None, **server}
    return Daemon(load_settings(overrides={"tiers": tiers, "server": section}))


class TlsClient(WireClient):
    """The same over TLS, trusting `certificate` only."""

    def __init__(self, port: int, certificate: Any, own: tuple[Any, Any] | None = None) -> None:
        super().__init__(port)
        context = ssl.create_default_context(cafile=str(certificate))
        if own:
            context.load_cert_chain(*own)
        self.socket = context.wrap_socket(self.socket, server_hostname="127.0.0.1")


def test_tenants_do_not_meet_and_keep_to_their_quota():
    tenants = {"acme": {"tiers": ["cpu://?capacity=2MiB"], "listen": "127.0.0.1:0"}}
    with daemon(tenants=tenants) as running:
        ports = running.ports
        with WireClient(ports["lm"]) as default, WireClient(ports["lm.acme"]) as acme:
            default.put(KEY, b"of the default tenant")
            assert acme.get(KEY) is None
            acme.put(KEY, b"of acme")
            assert default.get(KEY) == b"of the default tenant"
            assert acme.get(KEY) == b"of acme"
            for number in range(8):
                acme.put(b"m@1@0@%x@half" % number, bytes(MIB // 2))
            assert acme.get(KEY) is None
            assert default.get(KEY) == b"of the default tenant"
        usage = running.state.stores["acme"].by_tier()["cpu"]
        assert usage.nbytes <= 2 * MIB == usage.capacity


def test_tls_on_the_wire(tmp_path):
    certificate, key = self_signed(tmp_path)
    with daemon(tls={"certificate": certificate, "key": key}) as running:
        with TlsClient(running.ports["lm"], certificate) as client:
            body = bytes(range(256)) * 5000
            client.put(KEY, body)
            assert client.get(KEY) == body
            # Two requests in one record: what is decrypted already must not be waited for.
            client.send(put_frame(b"x", b"12") + frame(2, b"x"))
            assert client.reply().code == 200
        with WireClient(running.ports["lm"]) as plain:
            plain.send(frame(2, KEY))
            assert plain.is_closed()
        wait_until(lambda: running.state.counters.get("closed", "bad_tls") == 1, "bad_tls")


def test_clients_must_show_a_certificate_if_a_ca_is_named(tmp_path):
    certificate, key = self_signed(tmp_path)
    with daemon(tls={"certificate": certificate, "key": key, "client_ca": certificate}) as running:
        with TlsClient(running.ports["lm"], certificate, (certificate, key)) as client:
            assert client.health().code == 200
        # TLS 1.3: the handshake seems done to the client, the refusal comes with the first answer.
        refused = pytest.raises((ssl.SSLError, ConnectionError, EOFError))
        with TlsClient(running.ports["lm"], certificate) as stranger, refused:
            stranger.health()


def test_a_certificate_that_is_not_there_is_told_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="TLS"):
        daemon(tls={"certificate": tmp_path / "no", "key": tmp_path / "no"}).start()


def test_slow_readers_hold_no_more_than_the_budget():
    size = 8 * MIB
    limits = {"max_object": size + MIB, "in_flight": 2 * size + 4096 * 4, "stall_timeout": 0.5}
    with daemon(("cpu://?capacity=64MiB",), **limits) as running, WireClient(running.ports["lm"]) as client:
        client.put(KEY, bytes(size))
        assert client.exist(KEY)
        readers = [WireClient(running.ports["lm"], receive_buffer=4096) for _ in range(6)]
        for reader in readers:
            reader.send(frame(2, KEY))
        wait_until(lambda: running.state.in_flight() >= 2 * size, "two readers that are served")
        assert running.state.in_flight() <= limits["in_flight"]
        # A client that does read gets its turn, as soon as those who do not are given up.
        wait_until(lambda: client.get(KEY) == bytes(size), "the object")
        for reader in readers:
            reader.close()
        wait_until(lambda: running.state.connections() == 1, "the readers' end")
        wait_until(lambda: running.state.in_flight() == 0, "the budget")


def test_draining_lets_a_request_end_and_waits_for_no_other():
    running = daemon(drain_timeout=30.0)
    running.start()
    idle, busy = WireClient(running.ports["lm"]), WireClient(running.ports["lm"])
    assert idle.health().code == busy.health().code == 200
    busy.send(put_frame(KEY, bytes(1000))[:700])
    wait_until(lambda: running.state.in_flight() == 1000, "the request")
    store = running.state.stores[""]
    kept = {}
    close = store.close

    def watched() -> None:
        kept["chunks"] = store.by_tier()["cpu"].chunks
        close()

    store.close = watched  # type: ignore[method-assign]
    stopping = threading.Thread(target=running.stop)
    stopping.start()
    assert idle.is_closed()
    busy.send(put_frame(KEY, bytes(1000))[700:])
    assert busy.is_closed()
    stopping.join()
    idle.close()
    busy.close()
    assert kept["chunks"] == 1


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "droidspeak", "serve", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["127.0.0.1", "0", "cuda"], "allowed: cpu"),
        (["--tier", "tape://x"], "unknown tier 'tape'"),
        (["--set", "server.speed=9"], "unknown configuration key 'server.speed'"),
        (["--set", "nonsense"], "KEY=VALUE"),
        (["--set", "chunk_size.x=1"], "chunk_size"),
        (["--log-level", "loud"], "allowed: debug"),
        (["no.such.host.invalid", "0", "--tier", "cpu://", "--no-http"], "cannot listen on no.such.host"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_line_and_status_2(arguments, told):
    result = serve(*arguments)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert told in lines[-1]
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            daemon(listen=f"127.0.0.1:{port}").start()


def test_a_start_that_fails_leaves_no_port_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        free, busy = other.getsockname()[1], taken.getsockname()[1]
        other.close()
        tenants = {"acme": {"tiers": ["cpu://"], "listen": f"127.0.0.1:{busy}"}}
        with pytest.raises(ConfigError, match="Address already in use"):
            daemon(listen=f"127.0.0.1:{free}", tenants=tenants).start()
        socket.create_server(("127.0.0.1", free)).close()


def test_the_process_says_where_it_listens_and_ends_at_sigterm(tmp_path):
    file = tmp_path / "droidspeak.yaml"
    file.write_text(
        "tiers: ['cpu://?capacity=4MiB']\n"
        "server:\n  http: 127.0.0.1:0\n  tenants: {acme: {tiers: ['cpu://'], listen: '127.0.0.1:0'}}\n"
    )
    with daemon_process("--config", str(file)) as process:
        assert set(process.ports) == {"lm", "lm.acme", "http"}
        with WireClient(process.ports["lm.acme"]) as client:
            assert client.health().code == 200
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in process.errors


def test_both_names_of_the_server_are_one_command():
    scripts = {entry.name: entry.value for entry in distribution("droidspeak").entry_points}
    assert scripts["lmcache_server"] == scripts["droidspeak-server"]


def test_what_memory_cannot_hold_is_spilled_to_disk_and_s3(tmp_path, s3_endpoint):
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="spill")
    tiers = (
        "cpu://?capacity=1MiB",
        f"disk://{tmp_path}/store?capacity=2MiB&min_free=0",
        f"s3://spill/cache?endpoint={s3_endpoint}&region=us-east-1",
    )
    objects = {b"m@1@0@%x@half" % number: bytes([number]) * (MIB // 2) for number in range(8)}
    with daemon(tiers) as running, WireClient(running.ports["lm"]) as client:
        for key, body in objects.items():
            client.put(key, body)
            assert client.exist(key)
        running.state.stores[""].flush()
        assert {key: client.get(key) for key in objects} == objects
        usage = running.state.stores[""].by_tier()
        assert usage["cpu"].nbytes <= MIB
        assert usage["disk"].nbytes <= 2 * MIB
        assert usage["s3"].chunks == len(objects)
    with daemon(tiers) as restarted, WireClient(restarted.ports["lm"]) as client:
        assert {key: client.get(key) for key in objects} == objects
