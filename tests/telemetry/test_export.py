"""Metrics of a process that serves a model: what is scraped says what has happened."""

from __future__ import annotations

import gc
import urllib.request
from dataclasses import replace
from weakref import WeakSet

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from droidspeak.connector import Connector, ConnectorOptions, Match, Outcome, Reason
from droidspeak.errors import ConfigError
from droidspeak.layerselect import Costs, Plan, Policy, PolicySet
from droidspeak.layerselect.drift import DriftGuard, DriftOptions
from droidspeak.storage import Architecture, SourceManifest, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.telemetry.export import expose, serve_metrics
from droidspeak.telemetry.table import METRICS

SIZE, LAYERS = 16, 4
ARCHITECTURE = Architecture("llama", LAYERS, 2, 4, 8, 1000, "rope", "full", "float32")
ME, SENDER = (SourceManifest(name, ARCHITECTURE, "ids:1000") for name in ("me", "sender"))
PAIR = {"source": SENDER.source_id[:12], "receiver": ME.source_id[:12]}
IDS = list(range(3 * SIZE + 1))
MADE: WeakSet[Connector] = WeakSet()
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def policy(costs: Costs | None = None) -> Policy:
    fixed = Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse("2-3", LAYERS))
    return fixed if costs is None else replace(fixed, costs=costs)


@pytest.fixture
def store(tmp_path):
    with TieredStore([MemoryTier(1 << 20), DiskTier(tmp_path, min_free=0)]) as store:
        yield store
        for made in list(MADE):
            made.close()


def connector(store, *policies: Policy, guard: DriftGuard | None = None) -> Connector:
    made = Connector(store, PolicySet(policies), ConnectorOptions(chunk_size=SIZE), guard=guard)
    MADE.add(made)
    return made


def save(saving: Connector, source: SourceManifest) -> None:
    import torch

    session = saving.save(IDS, source)
    for layer in range(LAYERS):
        k, v, e = torch.ones(len(IDS), 2, 4), torch.zeros(len(IDS), 2, 4), torch.ones(len(IDS), 8)
        session.put(layer, k, v, e if layer in session.e_layers else None)
    assert session.finish(wait=True) == 3


def scrape(registry: CollectorRegistry) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            key = sample.name.removeprefix("droidspeak_"), tuple(sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0)


def test_a_request_from_lookup_to_outcome(store):
    registry = CollectorRegistry()
    save(connector(store, policy()), SENDER)
    serving = connector(store, policy())
    expose(serving, registry)
    match = serving.lookup(IDS, ME)
    with serving.load(match) as stream:
        for layer in range(2):
            stream.kv(layer)
        stream.e(2)
    outcome = Outcome(match.reason, len(IDS), 0, 3 * SIZE, match.plan, match.source, 1234, 0.5)
    serving.record(outcome, match)
    serving.record_ttft(outcome, 0.2)
    serving.lookup([1, 2, 3], ME)
    samples = scrape(registry)
    assert value(samples, "lookups_total", result="cross_model_hit") == 1
    assert value(samples, "lookups_total", result="too_short") == 1
    assert value(samples, "lookup_seconds_count") == 2
    assert 0 < value(samples, "lookup_seconds_sum") < 60
    assert value(samples, "requests_total", status="applied", reason="cross_model_hit") == 1
    assert value(samples, "hit_tokens_total", **PAIR) == 3 * SIZE
    assert value(samples, "plan_layers_total", action="recompute") == 2
    assert value(samples, "plan_layers_total", action="reuse") == 2
    decoded = 3 * SIZE * (2 * 2 * ARCHITECTURE.kv_heads * 4 * 4 + 8 * 4)
    assert value(samples, "load_bytes_total", tier="cpu") == decoded
    assert value(samples, "load_seconds_total", tier="cpu") > 0
    assert value(samples, "stored_bytes_loaded_total") == 1234
    assert value(samples, "load_wait_seconds_total") == 0.5
    assert value(samples, "ttft_seconds_bucket", hit="other", le="0.25") == 1
    assert value(samples, "ttft_seconds_bucket", hit="other", le="0.1") == 0
    assert value(samples, "ttft_seconds_sum", hit="other") == pytest.approx(0.2)


def test_what_policies_predict(store):
    registry = CollectorRegistry()
    costs = Costs(per_token=0.001, per_token_pair=0.0, per_mapped_token=0.0, suffix=0.25)
    save(connector(store, policy()), SENDER)
    serving = connector(store, policy(costs))
    expose(serving, registry)
    assert serving.lookup(IDS, ME).reason is Reason.CROSS_MODEL_HIT
    samples = scrape(registry)
    assert value(samples, "ttft_predicted_seconds_count") == 1
    # Two layers of 48 tokens, and the suffix; no tier's bandwidth is known yet.
    assert value(samples, "ttft_predicted_seconds_sum") == pytest.approx(2 * 48 * 0.001 + 0.25)


def test_connectors_of_one_process_are_added_up_and_their_store_counts_once(store):
    registry = CollectorRegistry()
    first, second = connector(store, policy()), connector(store, policy())
    for serving in (first, second, first):
        expose(serving, registry)
    save(first, SENDER)
    save(second, ME)
    store.flush()
    samples = scrape(registry)
    assert value(samples, "save_chunks_total", result="saved") == 6
    assert value(samples, "tier_chunks", tenant="", tier="disk") == 6
    assert value(samples, "tier_up", tenant="", tier="disk") == 1
    assert value(samples, "write_queue_bytes", tenant="", tier="disk") == 0
    assert value(samples, "save_queue_capacity_bytes") == 2 << 30
    first.close()
    del first, serving
    gc.collect()
    assert value(scrape(registry), "save_chunks_total", result="saved") == 3


def test_drift_of_each_pair(store):
    registry = CollectorRegistry()
    guard = DriftGuard(DriftOptions(least=2, window=4))
    expose(watched := connector(store, policy(), guard=guard), registry)
    for _sample in range(3):
        guard.observe(policy(), 0.0, 9.0)
    samples = scrape(registry)
    assert value(samples, "drift_out_of_service", **PAIR) == 1
    assert value(samples, "drift_samples_total", **PAIR) == 3
    guard.observe(policy(), 0.75, 0.5)
    guard.observe(policy(), 0.75, 0.5)
    samples = scrape(registry)
    assert value(samples, "drift_agreement_ratio", **PAIR) < 1
    assert ("drift_kl_nats", tuple(sorted(PAIR.items()))) in samples
    watched.close()


def test_models_without_a_policy_have_no_label_beyond_the_first(store):
    registry = CollectorRegistry()
    expose(serving := connector(store), registry)
    for number in range(200):
        receiver = SourceManifest(f"adapter {number}", ARCHITECTURE, "ids:1000")
        match = Match(receiver, Reason.EXACT_HIT, 17, SIZE)
        serving.record(Outcome(Reason.EXACT_HIT, 17, 16), match)
    hits = {key: count for key, count in scrape(registry).items() if key[0] == "hit_tokens_total"}
    assert len(hits) == 65
    assert sum(hits.values()) == 200 * 16
    assert value(scrape(registry), "hit_tokens_total", source="other", receiver="other") == 136 * 16


def test_every_row_is_scraped_with_its_labels(store):
    registry = CollectorRegistry()
    expose(serving := connector(store, policy()), registry)
    save(serving, SENDER)
    serving.lookup(IDS, ME)
    exported = {
        family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())
    }
    for row in METRICS:
        if row.part == "server":
            assert row.family not in exported
            continue
        family = exported[row.family]
        assert (family.type, family.documentation) == (row.kind, row.help)
        for sample in family.samples:
            assert set(sample.labels) == set(row.series[sample.name])


def test_an_endpoint_of_its_own(store):
    registry = CollectorRegistry()
    serving = connector(store)
    with serve_metrics(serving, port=0, registry=registry) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
            assert b"droidspeak_build_info" in answer.read()
        with pytest.raises(ConfigError, match="metrics cannot be served"):
            serve_metrics(serving, port=server.port, registry=registry)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10)


def test_a_store_that_is_one_tier():
    registry = CollectorRegistry()
    with MemoryTier(1 << 20) as tier:
        expose(serving := connector(tier), registry)
        save(serving, ME)
        assert value(scrape(registry), "tier_chunks", tenant="", tier="cpu") == 3
