"""What a request leaves behind: spans and metrics."""

from __future__ import annotations

import urllib.request

import pytest
import torch
from opentelemetry.trace import StatusCode
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from droidspeak.connector import Reason
from droidspeak.integrations.transformers.answer import answer
from droidspeak.layerselect import PolicySet
from droidspeak.telemetry.export import expose

from .sharing import SIZE, door, fill, memory, policy
from .tiny_models import tiny_model, tokens

IDS = tokens(4 * SIZE + 5, seed=1)
MINE, THEIRS = tiny_model("llama"), tiny_model("llama", seed=7)


@pytest.fixture
def receiver():
    store, policies = memory(), PolicySet()
    with door(THEIRS, store, policies) as sender, door(MINE, store, policies) as receiver:
        policies.add(policy(sender, receiver, "1-2"))
        fill(sender, IDS)
        yield receiver


def by_name(spans):
    return {ended.name: ended for ended in spans.get_finished_spans()}


def test_a_shared_prefix_is_one_trace(receiver, spans):
    receiver.prefill(IDS)
    found = by_name(spans)
    whole = found["droidspeak.prefill"]
    assert whole.attributes["droidspeak.status"] == "applied"
    for part in ("lookup", "load", "recompute"):
        assert found[f"droidspeak.{part}"].parent.span_id == whole.context.span_id
    assert found["droidspeak.recompute"].attributes["droidspeak.recomputed_layers"] == 2
    assert found["droidspeak.load"].attributes["droidspeak.bytes"] > 0


def test_a_load_that_fails_fails_its_spans_and_not_the_request(receiver, spans, monkeypatch):
    monkeypatch.setattr(receiver.connector.store, "read", lambda *_arguments: None)
    assert receiver.prefill(IDS).outcome.reason is Reason.EVICTED
    found = by_name(spans)
    for part in ("load", "recompute"):
        assert found[f"droidspeak.{part}"].status.status_code is StatusCode.ERROR
    assert found["droidspeak.load"].status.description == "evicted"
    assert found["droidspeak.prefill"].status.status_code is StatusCode.UNSET
    assert found["droidspeak.prefill"].attributes["droidspeak.reason"] == "evicted"


def test_the_time_to_first_token_is_counted_where_it_is_measured(receiver):
    registry = CollectorRegistry()
    expose(receiver.connector, registry)
    told = answer(receiver, IDS.tolist(), max_new_tokens=2, eos_ids=())
    assert told.outcome.reason is Reason.CROSS_MODEL_HIT
    assert told.ttft > 0
    text = generate_latest(registry).decode()
    assert 'droidspeak_ttft_seconds_count{hit="other"} 1.0' in text


def test_generate_measures_the_time_to_its_first_token(receiver):
    registry = CollectorRegistry()
    expose(receiver.connector, registry)
    asked = []

    def never(input_ids, _scores, **_options):
        asked.append(input_ids.shape)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    batch = torch.stack([IDS, tokens(len(IDS), seed=2)])
    told = receiver.generate(batch, max_new_tokens=3, min_new_tokens=3, stopping_criteria=[never])
    assert [outcome.reason for outcome in told.outcomes] == [Reason.CROSS_MODEL_HIT, Reason.MISS]
    assert len(asked) == 3
    text = generate_latest(registry).decode()
    for hit in ("other", "none"):
        assert f'droidspeak_ttft_seconds_count{{hit="{hit}"}} 1.0' in text


def test_the_door_serves_its_metrics(receiver):
    server = receiver.expose_metrics(port=0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as told:
            assert b"droidspeak_lookups_total" in told.read()
    finally:
        server.close()
    assert "droidspeak_lookups_total" in generate_latest(REGISTRY).decode()
