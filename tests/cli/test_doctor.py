"""`droidspeak doctor`: what is sound passes, and what is not is named with what to do."""

from __future__ import annotations

import json
import os
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from time import time

import pytest

from droidspeak.config import load_settings
from droidspeak.integrations.server.daemon import Daemon
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.testing import make_chunk

from .commandline import call


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("DROIDSPEAK_")]:
        monkeypatch.delenv(name)


def examined(*arguments: object, status: int = 0) -> dict[str, dict[str, str]]:
    """The checks by name."""
    told = call("doctor", "--format", "json", *arguments)
    assert told.returncode == status
    assert "Traceback" not in told.stderr
    document = json.loads(told.stdout)
    assert (document["version"], set(document)) == (1, {"version", "ok", "checks", "settings"})
    assert all(set(check) == {"name", "verdict", "found", "advice"} for check in document["checks"])
    assert all(set(setting) == {"key", "value", "source"} for setting in document["settings"])
    assert document["ok"] is (status == 0)
    checks = {check["name"]: check for check in document["checks"]}
    assert all(check["advice"] for check in checks.values() if check["verdict"] == "fail")
    return checks


def tiers(monkeypatch, *urls: str) -> None:
    monkeypatch.setenv("DROIDSPEAK_TIERS", " ".join(urls))


def test_nothing_configured_is_sound_and_stays_untouched(tmp_path):
    checks = examined()
    assert {check["verdict"] for check in checks.values()} <= {"ok", "warn"}
    assert {
        "environment",
        "droidspeak",
        "torch",
        "configuration",
        "policies",
        "tier cpu",
        "tier disk",
    } <= set(checks)
    assert not (tmp_path / "cache" / "droidspeak" / "store").exists()


def test_extras_that_are_not_there_say_how_they_come():
    checks = examined()
    for name, check in checks.items():
        if name.startswith("extra ") and check["found"].startswith("not installed"):
            assert (
                check["advice"] == f"if you want it: pip install 'droidspeak[{name.removeprefix('extra ')}]'"
            )
    assert checks["extra s3"]["found"].startswith("boto3 ")


def test_a_store_is_asked_and_left_as_it_is(monkeypatch, tmp_path):
    with DiskTier(tmp_path / "store", min_free=0) as disk:
        disk.write(make_chunk(1))
        tiers(monkeypatch, f"disk://{tmp_path}/store?capacity=1MiB&min_free=0")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
        assert examined()["tier disk"]["found"].startswith("asked for a chunk in ")
        found = examined("--write")["tier disk"]["found"]
        assert [word for word in ("wrote", "read", "deleted") if word in found] == [
            "wrote",
            "read",
            "deleted",
        ]
        assert list(map(str, disk.keys())) == [str(make_chunk(1).key)]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
    assert after == before


def test_room(monkeypatch, tmp_path):
    tiers(
        monkeypatch,
        f"disk://{tmp_path}/a?capacity=900TiB&min_free=0&name=greedy",
        f"disk://{tmp_path}/b?min_free=900TiB",
    )
    checks = examined(status=3)
    assert checks["tier greedy room"]["verdict"] == "warn"
    assert "capacity" in checks["tier greedy room"]["advice"]
    assert checks["tier disk room"]["verdict"] == "fail"
    assert "min_free" in checks["tier disk room"]["advice"]


def test_what_cannot_be_reached(monkeypatch, tmp_path, s3_endpoint):
    (tmp_path / "file").write_text("no folder")
    tiers(
        monkeypatch,
        f"disk://{tmp_path}/file/store",
        "droidspeak://127.0.0.1:1",
        f"s3://no-such-bucket/x?endpoint={s3_endpoint}",
    )
    checks = examined("--write", status=3)
    assert {checks[name]["verdict"] for name in ("tier disk", "tier droidspeak", "tier s3")} == {"fail"}
    assert checks["tier droidspeak clock"]["verdict"] == "warn"
    assert checks["tier s3 clock"]["verdict"] == "ok"


def test_a_daemon_and_its_clock(monkeypatch, tmp_path):
    overrides = {
        "tiers": ["cpu://?capacity=1MiB"],
        "server": {"listen": "127.0.0.1:0", "http": "127.0.0.1:0"},
    }
    with Daemon(load_settings(overrides=overrides)) as daemon:
        tiers(monkeypatch, f"droidspeak://127.0.0.1:{daemon.ports['http']}")
        checks = examined("--write")
    assert checks["tier droidspeak"]["found"].startswith("wrote in ")
    assert checks["tier droidspeak clock"]["verdict"] == "ok"


@pytest.mark.parametrize(("ahead", "verdict"), [(60, "warn"), (-60, "warn"), (7200, "fail")])
def test_a_clock_that_is_wrong(monkeypatch, ahead, verdict):
    class Late(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", formatdate(time() + ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    with HTTPServer(("127.0.0.1", 0), Late) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        tiers(monkeypatch, f"droidspeak://127.0.0.1:{server.server_port}?timeout=5")
        told = call("doctor", "--format", "json")
        server.shutdown()
    (clock,) = [check for check in json.loads(told.stdout)["checks"] if check["name"].endswith("clock")]
    assert clock["verdict"] == verdict
    assert ("ahead of" if ahead > 0 else "behind") in clock["found"]
    assert "NTP" in clock["advice"]


def test_policies(monkeypatch, tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    monkeypatch.setenv("DROIDSPEAK_POLICIES", str(tmp_path))
    checks = examined()
    assert checks["policies"]["found"] == f"0 of pairs in {tmp_path}"
    assert checks["policy broken.json"]["verdict"] == "warn"
    monkeypatch.setenv("DROIDSPEAK_POLICIES", str(tmp_path / "none"))
    assert examined(status=3)["policies"]["verdict"] == "fail"


def test_a_configuration_that_is_wrong(tmp_path):
    (tmp_path / "wrong.yaml").write_text("codec: gzip")
    checks = examined("--config", tmp_path / "wrong.yaml", status=3)
    assert checks["configuration"]["verdict"] == "fail"
    assert "allowed: raw, zstd" in checks["configuration"]["found"]
    assert "torch" in checks


def test_the_table_names_what_is_not_the_default(monkeypatch):
    monkeypatch.setenv("DROIDSPEAK_CODEC", "zstd")
    told = call("doctor")
    assert told.returncode == 0
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("codec")]
    assert line.split() == ["codec", "zstd", "environment", "DROIDSPEAK_CODEC"]


def test_no_colour_is_honoured(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in call("doctor").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in call("doctor").stdout
