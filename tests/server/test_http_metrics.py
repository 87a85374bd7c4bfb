"""Metrics: what is scraped is the table, and says what has happened; the page says the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from droidspeak.config import load_settings
from droidspeak.errors import TierUnavailable
from droidspeak.integrations.server.daemon import Daemon
from droidspeak.integrations.server.http.app import make_app
from droidspeak.integrations.server.http.metrics import ROWS
from droidspeak.integrations.server.http.refusals import Reason
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import TieredStore
from droidspeak.storage.testing import make_chunk
from droidspeak.storage.wrappers import FaultyTier, MeteredTier, WrapperTier, fail

from .httpclient import HttpClient, disk, memory, path_of, serving, store_of
from .wireclient import WireClient, wait_until

PAGE = Path(__file__).parents[2] / "docs" / "http-api.md"
CHUNK = make_chunk(1)
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> Iterator[Daemon]:
    """Both sides, and a tenant of its own."""
    folder = tmp_path_factory.mktemp("metrics")
    server = {
        "listen": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "in_flight": "1GiB",
        "tenants": {"acme": {"tiers": ["cpu://?capacity=8MiB"]}},
    }
    tiers = ["cpu://?capacity=64MiB", f"disk://{folder}?capacity=64MiB&min_free=0"]
    with Daemon(load_settings(overrides={"tiers": tiers, "server": server})) as daemon:
        yield daemon


@pytest.fixture
def client(daemon) -> Iterator[HttpClient]:
    client = HttpClient(daemon.ports["http"])
    yield client
    client.close()


def scrape(client: HttpClient) -> Samples:
    answer = client.ask("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples: Samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            assert key not in samples.setdefault(sample.name, {}), "two samples of one name and labels"
            samples[sample.name][key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get(f"droidspeak_{name}", {}).get(tuple(sorted(labels.items())), 0)


def test_the_table_is_what_is_scraped(client):
    answer = client.ask("GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
    assert len(families) == len(ROWS)
    for row in ROWS:
        family = families[f"droidspeak_{row.name}"]
        assert (family.type, family.documentation) == (row.kind, row.help)
        assert all(sample.name == row.full_name for sample in family.samples)
        assert all(set(sample.labels) == set(row.labels) for sample in family.samples)
        if row.unit:
            assert row.name.endswith(f"_{row.unit}")
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("droidspeak")]


def test_both_sides_are_counted(daemon, client):
    before = scrape(client)
    with WireClient(daemon.ports["lm"]) as lm:
        lm.put(b"m@1@0@1f@bfloat16", bytes(4096))
        assert lm.exist(b"m@1@0@1f@bfloat16")
        assert value(scrape(client), "server_connections", side="lm") == 1
    client.put(CHUNK)
    assert client.ask("GET", path_of(CHUNK.key)).status == 200
    assert client.ask("GET", path_of(make_chunk(2).key)).status == 404
    assert client.ask("GET", "/v1/objects?name=m%401%400%401f%40bfloat16").status == 200
    after = scrape(client)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("server_requests_total", side="lm", command="put", status="") == 1
    assert grown("server_requests_total", side="http", command="get_chunk", status="200") == 1
    assert grown("server_requests_total", side="http", command="get_chunk", status="404") == 1
    assert grown("server_requests_total", side="http", command="put_chunk", status="204") == 1
    assert grown("server_refused_total", side="http", reason="not_found") == 1
    assert grown("server_received_bytes_total", side="lm") == 4096
    assert grown("server_received_bytes_total", side="http") == CHUNK.header.nbytes
    assert grown("server_sent_bytes_total", side="http") > CHUNK.header.nbytes
    wait_until(lambda: value(scrape(client), "server_connections", side="http") == 1, "older clients left")
    assert value(after, "server_ready") == 1
    assert value(after, "server_in_flight_bytes") == 0
    assert value(after, "server_in_flight_capacity_bytes") == 1 << 30


def test_tiers_and_their_events(daemon, client):
    client.put(CHUNK)
    store = daemon.state.stores[""]
    assert store.flush()
    assert client.ask("GET", path_of(CHUNK.key)).status == 200
    usages = store.by_tier()
    # Usage may be as old as a hundred times what it costs to ask.
    wait_until(lambda: value(scrape(client), "tier_bytes", tenant="", tier="disk") == usages["disk"].nbytes)
    samples = scrape(client)
    for tier, usage in usages.items():
        where = {"tenant": "", "tier": tier}
        assert value(samples, "tier_up", **where) == 1
        assert value(samples, "tier_chunks", **where) == usage.chunks > 0
        assert value(samples, "tier_capacity_bytes", **where) == usage.capacity
    assert value(samples, "tier_up", tenant="acme", tier="cpu") == 1
    assert value(samples, "tier_bytes", tenant="acme", tier="cpu") == 0
    hits = store.counters.get("hits", "cpu")
    assert value(samples, "store_events_total", tenant="", tier="cpu", event="hits") == hits > 0


def test_labels_are_bounded(client):
    """Whatever clients name, no label takes it over."""
    before = {name: len(rows) for name, rows in scrape(client).items()}
    for number in range(50):
        client.ask("GET", path_of(make_chunk(number + 100).key))
        client.ask("GET", f"/v1/odd-{number}")
        client.ask("GET", f"/v1/objects?name=model-{number}")
        client.ask("GET", f"/v1/usage?tenant=tenant-{number}")
    after = {name: len(rows) for name, rows in scrape(client).items()}
    assert sum(after.values()) - sum(before.values()) < 10


def test_a_tier_that_does_not_answer():
    broken = FaultyTier(memory(), {"usage": repeat(fail(TierUnavailable("unplugged")))})
    with serving(store_of(broken)) as served:
        samples = scrape(served.client)
        assert value(samples, "tier_up", tenant="", tier="cpu") == 0
        assert "droidspeak_tier_bytes" not in samples


def test_a_tier_whose_usage_is_dear_is_asked_seldom(tmp_path):
    class Dear(MeteredTier):
        def usage(self) -> Any:
            time.sleep(0.2)
            return super().usage()

    tier = Dear(disk(tmp_path / "store"))
    with serving(store_of(tier)) as served:
        for _scrape in range(5):
            assert value(scrape(served.client), "tier_up", tenant="", tier="disk") == 1
        assert tier.snapshot()["usage"].calls == 1


def test_a_full_tier_evicts_and_says_so():
    with serving(store_of(memory(capacity=2 * CHUNK.header.nbytes))) as served:
        for number in range(5):
            served.client.put(make_chunk(number))
        samples = scrape(served.client)
        assert value(samples, "tier_evicted_chunks_total", tenant="", tier="cpu") == 3
        assert value(samples, "tier_evicted_bytes_total", tenant="", tier="cpu") == 3 * CHUNK.header.nbytes


def test_what_waits_and_what_is_skipped(tmp_path):
    held = threading.Event()

    class Stuck(WrapperTier):
        def write(self, chunk: Any) -> None:
            held.wait(30)
            super().write(chunk)

    broken = FaultyTier(disk(tmp_path / "b", name="broken"), {"read": repeat(fail(TierUnavailable("gone")))})
    with serving(TieredStore([Stuck(disk(tmp_path / "a", name="slow")), broken])) as served:
        try:
            served.client.put(CHUNK)
            served.client.ask("GET", path_of(make_chunk(2).key))
            samples = scrape(served.client)
        finally:
            held.set()
    slow = {"tenant": "", "tier": "slow"}
    assert value(samples, "write_queue_bytes", **slow) == CHUNK.nbytes
    assert value(samples, "write_queue_capacity_bytes", **slow) > CHUNK.nbytes
    assert value(samples, "tier_skipped", **slow, side="reading") == 0
    assert value(samples, "tier_skipped", tenant="", tier="broken", side="reading") == 1


# The page


def test_the_page_has_every_endpoint_and_reason():
    page = PAGE.read_text()
    state = DaemonState(load_settings(overrides={"tiers": ["cpu://"]}), {})
    for path, operations in make_app(state).openapi()["paths"].items():
        place = path.replace("/v1/chunks/{source}/{shard}/{prefix}", "KEY")
        for method in operations:
            assert f"`{method.upper()} {place}`" in page, (method, path)
    for reason in Reason:
        assert f"| `{reason}` |" in page
