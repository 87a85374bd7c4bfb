"""`droidspeak store shared` and `store stats`: real stores, real reports, and a real Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from droidspeak.connector import Connector, ConnectorOptions, Match, Outcome, Reason
from droidspeak.connector.reports import encoded
from droidspeak.integrations.cli.store.rates import Rates
from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import make_chunk
from tests.connector.models import SIZE, model
from tests.server.pagestore import pair, policy, report, source
from tests.storage.daemons import closed_port, serving

from .commandline import call


def keep(folder, *reports) -> str:
    """A disk store with reports in it; its URL."""
    with DiskTier(folder / "store", min_free=0) as tier:
        for one in reports:
            tier.put_report(one.id, encoded(one))
    return f"disk://{folder / 'store'}"


def told():
    return (
        report(pair("base", "coder", 51200), pair("coder", "coder", 20480)),
        report(pair("base", "analyst", 12800), age=9000, ended=True),
    )


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("DROIDSPEAK_CONFIG", raising=False)
    monkeypatch.delenv("DROIDSPEAK_POLICIES", raising=False)
    return keep(tmp_path, *told())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


# shared


def test_the_matrix(store):
    done = call("store", "shared", "--store", store)
    assert (done.returncode, done.stderr) == (0, "")
    title, head, *rows = done.stdout.splitlines()
    assert title.strip() == "Tokens saved"
    base, coder, analyst = (source(name)[:12] for name in ("base", "coder", "analyst"))
    assert cells(head) == ["from, to:", coder, analyst, "to others"]
    assert [cells(row) for row in rows] == [[base, "38,400", "9,600", "48,000"], [coder, "20,480", "-", "-"]]


def test_the_matrix_in_bytes(store):
    done = call("store", "shared", "--by", "bytes", "--store", store)
    base, coder = (source(name)[:12] for name in ("base", "coder"))
    rows = [cells(row) for row in done.stdout.splitlines()[2:]]
    # What a model has from its own cache, it had to store.
    assert rows == [[base, "800.0 MiB", "200.0 MiB", "1000.0 MiB"], [coder, "-", "-", "-"]]


def test_names_come_from_policies(store, tmp_path, monkeypatch):
    policy(tmp_path / "policies", "base", "coder")
    monkeypatch.setenv("DROIDSPEAK_POLICIES", str(tmp_path / "policies"))
    done = call("store", "shared", "--store", store)
    assert cells(done.stdout.splitlines()[1]) == ["from, to:", "coder", source("analyst")[:12], "to others"]
    row = json.loads(call("store", "shared", "--store", store, "--format", "jsonl").stdout.splitlines()[0])
    assert (row["sender_model"], row["receiver_model"]) == ("base", "coder")


def test_pairs_as_json(store):
    done = call("store", "shared", "--store", store, "--format", "json")
    document = json.loads(done.stdout)
    assert document["version"] == 1
    assert document["pairs"][0] == {
        "sender": source("base"),
        "sender_model": None,
        "receiver": source("coder"),
        "receiver_model": None,
        "requests": 100,
        "tokens": 51200,
        "tokens_saved": 38400.0,
        "bytes_loaded": 0,
        "bytes_unstored": 51200 * 16384,
    }
    lines = call("store", "shared", "--store", store, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == document["pairs"]
    quiet = call("store", "shared", "--store", store, "--format", "quiet").stdout.splitlines()
    assert quiet[0].split() == [source("base"), source("coder")]
    assert len(quiet) == 3


def test_one_report_in_two_tiers_counts_once(store, tmp_path):
    one = told()[0]
    also = keep(tmp_path / "other", one, one)
    alone = json.loads(call("store", "shared", "--store", also, "--format", "json").stdout)
    twice = call("store", "shared", "--store", also, "--store", also, "--format", "json")
    assert json.loads(twice.stdout) == alone


def test_nothing_shared_yet(tmp_path):
    done = call("store", "shared", "--store", keep(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert "no engine has told of a hit yet" in done.stderr
    document = json.loads(call("store", "shared", "--store", keep(tmp_path), "--format", "json").stdout)
    assert document == {"version": 1, "pairs": []}


def test_through_a_daemon(tmp_path):
    with serving(TieredStore([DiskTier(tmp_path / "far", min_free=0)])) as port:
        url = f"droidspeak://127.0.0.1:{port}"
        with Connector_of(url) as told_tokens:
            done = call("store", "shared", "--store", url, "--format", "json")
            (row,) = json.loads(done.stdout)["pairs"]
            assert (row["sender"], row["tokens"]) == (row["receiver"], told_tokens)


class Connector_of:
    """A connector over the daemon at `url` that has told of one hit."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> int:
        from droidspeak.storage.urls import open_tier

        with open_tier(self._url) as tier:
            engine = Connector(tier, options=ConnectorOptions(chunk_size=SIZE, report_interval=60))
            match = Match(model("me"), Reason.EXACT_HIT, 2 * SIZE, SIZE)
            engine.record(Outcome(Reason.EXACT_HIT, 2 * SIZE, exact_tokens=SIZE), match)
            engine.close()
        return SIZE

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("command", ["shared", "stats"])
def test_a_tier_that_cannot_be_reached(command, store):
    url = f"droidspeak://127.0.0.1:{closed_port()}"
    done = call("store", command, "--store", store, "--store", url, "--format", "json")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    # What the other one has is shown all the same.
    assert json.loads(done.stdout)
    assert call("store", command, "--store", f"{store}-not").returncode == 4


# stats


def test_stats(tmp_path):
    store = TieredStore([MemoryTier(1 << 20), DiskTier(tmp_path / "store", min_free=0)])
    with store:
        for seed in range(3):
            store.write(make_chunk(seed))
            store.read(make_chunk(seed).key)
        store.flush()
        engine = Connector(store, options=ConnectorOptions(chunk_size=SIZE, report_interval=60))
        match = Match(model("me"), Reason.EXACT_HIT, 3 * SIZE, SIZE)
        for _ in range(3):
            engine.record(Outcome(Reason.EXACT_HIT, 3 * SIZE, exact_tokens=2 * SIZE), match)
        engine.record(Outcome(Reason.MISS, 3 * SIZE), match)
        engine.counters.add("load_bytes", "disk", 5_000_000)
        engine.counters.add("load_ns", "disk", 2_000_000)
        engine.close()
    url = f"disk://{tmp_path / 'store'}?capacity=1MiB"
    found = json.loads(call("store", "stats", "--store", url, "--format", "json").stdout)
    assert (found["version"], found["hit_rate"], found["per_second"]) == (1, 0.75, None)
    assert found["requests"] == {"applied": 3, "fallback_reprefill": 1}
    assert found["reasons"] == {"exact_hit": 3, "miss": 1}
    assert found["tokens"] == {"own": 6 * SIZE, "shared": 0, "saved": 6.0 * SIZE}
    assert found["loads"] == [{"tier": "disk", "bytes": 5_000_000, "seconds": 0.002, "bandwidth": 2.5e9}]
    assert found["events"]["hits"] == {"cpu": 3}
    (tier,) = found["tiers"]
    assert (tier["tier"], tier["chunks"], tier["capacity"]) == ("disk", 3, 1 << 20)
    assert (found["engines"], found["processes"]) == (0, 1)
    table = call("store", "stats", "--store", url).stdout
    for text in ("75.0 %", "exact_hit", "2.3 GiB/s", "disk"):
        assert text in table
    assert call("store", "stats", "--store", url, "--format", "quiet").stdout == ""


def test_stats_of_nothing(tmp_path):
    found = json.loads(call("store", "stats", "--store", keep(tmp_path), "--format", "json").stdout)
    assert (found["hit_rate"], found["requests"], found["events"]) == (None, {}, {})
    assert call("store", "stats", "--store", keep(tmp_path)).returncode == 0


def test_a_daemon_tells_what_it_counted_itself(tmp_path):
    with serving(store := TieredStore([DiskTier(tmp_path / "far", min_free=0)])) as port:
        store.write(make_chunk(0))
        store.flush()
        store.read(make_chunk(0).key)
        url = f"droidspeak://127.0.0.1:{port}"
        found = json.loads(call("store", "stats", "--store", url, "--format", "json").stdout)
    assert found["daemons"] == {"remote": {"hits": {"disk": 1}}}
    assert [tier["tier"] for tier in found["tiers"]] == ["remote/disk"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x"])
def test_a_period_that_is_none(store, seconds):
    assert call("store", "stats", "--watch", seconds, "--store", store).returncode == 2


def watching(store: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "droidspeak", "store", "stats", "--watch", "0.1", "--store", store]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_watching_line_by_line_until_interrupted(store, tmp_path):
    process = watching(store, "--format", "jsonl")
    first = json.loads(process.stdout.readline())
    assert first["per_second"] is None
    assert first["requests"] == {"applied": 16, "fallback_reprefill": 4}
    now = datetime.now(UTC)
    begun = (now - timedelta(seconds=10)).isoformat()
    keep(tmp_path, report(pair("base", "coder", 5120), age=0, started=begun))
    while not (rates := json.loads(process.stdout.readline())["per_second"])["requests"]:
        pass
    # Ten seconds' worth, whatever the time between two looks.
    assert rates["tokens_shared"] == pytest.approx(512, rel=0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert all(json.loads(line) for line in out.splitlines())


def test_watching_tables_until_interrupted(store):
    process = watching(store)
    for line in process.stdout:
        if line.startswith("Tiers"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_watching_on_a_terminal(store):
    """The table is drawn in place: the cursor goes back up, and is there again at the end."""
    import os
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "droidspeak", "store", "stats", "--watch", "0.1", "--store", store]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower)
    os.close(follower)
    seen = b""
    while seen.count(b"Requests,") < 3:
        seen += os.read(leader, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while more := os.read(leader, 65536):
            seen += more
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(60) == 130
    assert b"\x1b[1A" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert b"Traceback" not in seen


# rates


def test_rates_are_of_the_time_that_engines_tell():
    rates, now = Rates(), datetime(2026, 11, 1, tzinfo=UTC)
    seconds = timedelta(seconds=1)

    def at(after: float, tokens: int, **rest):
        return report(
            pair("base", "coder", tokens), id="0" * 32, started=now, updated=now + after * seconds, **rest
        )

    assert rates.of([at(0, 512)], now) is None
    first = rates.of([at(0, 512)], now + seconds)
    assert first["tokens_shared"] == 0
    # It has told of ten more requests, five seconds after the last time.
    for look in (5, 6, 7):
        found = rates.of([at(5, 512 * 11)], now + look * seconds)
        assert found["tokens_shared"] == 1024
        assert found["tokens_saved"] == 768
    silent = rates.of([at(5, 512 * 11)], now + 30 * seconds)
    assert silent["tokens_shared"] == 0


def test_rates_of_who_came_and_of_who_was_folded():
    rates, now = Rates(), datetime(2026, 11, 1, tzinfo=UTC)
    assert rates.of([], now) is None
    came = report(pair("base", "coder", 5120), started=now, updated=now + timedelta(seconds=10))
    total = report(pair("base", "coder", 10**9), engine="total", started=now, updated=now)
    found = rates.of([came, total], now + timedelta(seconds=10))
    assert found["tokens_shared"] == 512
