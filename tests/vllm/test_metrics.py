"""What travels from the connector to vLLM's `/metrics`, by vLLM's own classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from droidspeak.storage import Counters
from droidspeak.telemetry.table import METRICS

# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = {"model_name": "m", "engine": "0"}


def exporter():
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from droidspeak.integrations.vllm_connector.metrics import ConnectorMetrics

    unregister_vllm_metrics()
    config = SimpleNamespace(kv_transfer_config=None)
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    return ConnectorMetrics(config, types, list(ENGINE), {0: list(ENGINE.values())})


def samples() -> dict[str, dict[tuple[str, ...], float]]:
    """By name and the values of our own labels, in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
        for sample in family.samples:
            if "droidspeak" in sample.name and not sample.name.endswith("_created"):
                assert {name: sample.labels.pop(name) for name in ENGINE} == ENGINE
                found.setdefault(sample.name, {})[
                    tuple(value for _, value in sorted(sample.labels.items()))
                ] = sample.value
    return found


def counted() -> Counters:
    counters = Counters()
    counters.add("reasons", "cross_model_hit", 2)
    counters.add("requests", "applied", 2)
    counters.add("shared_tokens", "f" * 64, 96)
    counters.add("hit_tokens", "aaaaaaaaaaaa bbbbbbbbbbbb", 96)
    counters.add("layers", "reuse", 6)
    counters.add("load_bytes", "disk", 1 << 20)
    counters.add("load_ns", "disk", 1_500_000_000)
    counters.add("lookup_failures")
    counters.observe("lookup", 0.003)
    return counters


def test_increments_become_the_metrics_of_the_table():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats

    metrics, counters = exporter(), counted()
    for _step in range(2):
        stats = ConnectorStats.since_last(counters)
        assert stats is not None
        metrics.observe(stats.data)
        assert ConnectorStats.since_last(counters) is None
        counters.add("layers", "reuse", 1)
    found = samples()
    assert found["droidspeak_requests_total"] == {("cross_model_hit", "applied"): 2}
    assert found["droidspeak_hit_tokens_total"] == {("bbbbbbbbbbbb", "aaaaaaaaaaaa"): 96}
    assert found["droidspeak_plan_layers_total"] == {("reuse",): 7}
    assert found["droidspeak_load_bytes_total"] == {("disk",): 1 << 20}
    assert found["droidspeak_load_seconds_total"] == {("disk",): 1.5}
    assert found["droidspeak_lookup_seconds_sum"] == {(): pytest.approx(0.003)}
    assert found["droidspeak_lookup_seconds_bucket"][("0.0025",)] == 0
    assert found["droidspeak_lookup_seconds_bucket"][("0.005",)] == 1
    assert found["vllm:droidspeak_events_total"] == {
        ("reasons", "cross_model_hit"): 2,
        ("requests", "applied"): 2,
        ("shared_tokens", ""): 96,
        ("lookup_failures", ""): 1,
    }
    known = {name for row in METRICS for name in row.series}
    assert {name for name in found if name.startswith("droidspeak")} <= known


def test_buckets_stay_exact_where_steps_are_added_up():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats

    metrics, counters = exporter(), Counters()
    seconds = (0.0002, 0.003, 0.004, 0.3, 100.0)
    for duration in seconds:
        counters.observe("ttft_predicted", duration)
    stats = ConnectorStats.since_last(counters)
    assert stats is not None
    metrics.observe(stats.aggregate(ConnectorStats(data={})).data)
    buckets = {
        bound: count for (bound,), count in samples()["droidspeak_ttft_predicted_seconds_bucket"].items()
    }
    for bound, count in buckets.items():
        assert count == sum(duration <= float(bound) for duration in seconds)


def test_a_second_engine_of_one_process():
    exporter()
    exporter().observe({"reasons|miss": 1})
    assert samples()["droidspeak_requests_total"] == {("miss", "fallback_reprefill"): 1}


def test_what_vllm_logs_are_the_events_alone():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats

    stats = ConnectorStats.since_last(counted())
    assert stats is not None
    assert "reasons cross_model_hit" in stats.reduce()
    assert not [name for name in stats.reduce() if name.startswith(("lookup_bucket", "load_", "hit_tokens"))]
