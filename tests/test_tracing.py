"""Spans, as OpenTelemetry's SDK gets them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from opentelemetry import trace
from opentelemetry.trace import StatusCode

from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.errors import LoadFailed
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.storage import Architecture, SourceManifest
from droidspeak.storage.memory import MemoryTier
from droidspeak.tracing import long_span, span

SIZE, LAYERS = 16, 4
ARCHITECTURE = Architecture("llama", LAYERS, 2, 4, 8, 1000, "rope", "full", "float32")
ME, SENDER = (SourceManifest(name, ARCHITECTURE, "ids:1000") for name in ("me", "sender"))
IDS = list(range(2 * SIZE + 1))


def named(spans, name: str):
    return [ended for ended in spans.get_finished_spans() if ended.name == name]


@pytest.fixture
def sharing():
    policy = Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse("2-3", LAYERS))
    with MemoryTier(1 << 20) as store:
        connector = Connector(store, PolicySet([policy]), ConnectorOptions(chunk_size=SIZE))
        session = connector.save(IDS, SENDER)
        for layer in range(LAYERS):
            rows = torch.ones(len(IDS), 2, 4)
            session.put(layer, rows, rows, torch.ones(len(IDS), 8) if layer in session.e_layers else None)
        session.finish(wait=True)
        yield connector
        connector.close()


def test_lookup_and_load(spans, sharing):
    with trace.get_tracer("app").start_as_current_span("request"):
        match = sharing.lookup(IDS, ME)
        with sharing.load(match) as stream:
            stream.kv(0)
            stream.e(2)
            stream.kv(1)
    (request,) = named(spans, "request")
    (lookup,) = named(spans, "droidspeak.lookup")
    (load,) = named(spans, "droidspeak.load")
    for part in (lookup, load):
        assert part.parent.span_id == request.context.span_id
        assert part.status.status_code is StatusCode.UNSET
        assert part.attributes["droidspeak.source"] == SENDER.source_id
        assert part.attributes["droidspeak.receiver"] == ME.source_id
        assert part.attributes["droidspeak.plan"] == "2-3"
        assert part.attributes["droidspeak.shared_tokens"] == 2 * SIZE
    assert lookup.attributes["droidspeak.tokens"] == len(IDS)
    assert lookup.attributes["droidspeak.reason"] == "cross_model_hit"
    assert load.attributes["droidspeak.bytes"] == stream.bytes_loaded > 0
    assert load.start_time >= lookup.end_time


def test_a_miss_has_no_source(spans, sharing):
    sharing.lookup([7] * 40, ME)
    (lookup,) = named(spans, "droidspeak.lookup")
    assert lookup.parent is None
    assert lookup.attributes["droidspeak.reason"] == "miss"
    assert "droidspeak.source" not in lookup.attributes


def test_a_load_that_fails_says_why(spans, sharing):
    match = sharing.lookup(IDS, ME)
    for info in match.shared:
        sharing.store.delete(info.key)
    with pytest.raises(LoadFailed), sharing.load(match) as stream:
        stream.kv(0)
    (load,) = named(spans, "droidspeak.load")
    assert (load.status.status_code, load.status.description) == (StatusCode.ERROR, "evicted")


def test_saving(spans, sharing):
    spans.clear()
    session = sharing.save(IDS, ME)
    for layer in range(LAYERS):
        session.put(layer, torch.ones(len(IDS), 2, 4), torch.ones(len(IDS), 2, 4))
    session.finish(wait=True)
    sharing.flush()
    saves = named(spans, "droidspeak.save")
    assert len(saves) == 2
    assert all(save.attributes["droidspeak.bytes"] > 0 for save in saves)


def test_what_is_raised_is_recorded(spans):
    with pytest.raises(ZeroDivisionError), span("droidspeak.x", {"a": 1, "b": None}):
        _ = 1 / 0
    (ended,) = named(spans, "droidspeak.x")
    assert ended.status.status_code is StatusCode.ERROR
    assert dict(ended.attributes) == {"a": 1}
    assert [event.name for event in ended.events] == ["exception"]


def test_a_long_span_ends_once(spans):
    traced = long_span("droidspeak.x", {})
    traced.end({"first": True})
    traced.end({"second": True}, "late")
    (ended,) = named(spans, "droidspeak.x")
    assert dict(ended.attributes) == {"first": True}


def test_without_a_provider_nothing_is_recorded():
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    with span("droidspeak.x", {"a": 1}) as traced:
        traced.set({"b": 2})
        traced.fail("of no account")
        assert trace.get_current_span() is trace.INVALID_SPAN
    long_span("droidspeak.x", {}).end({}, "of no account")


def test_opentelemetry_is_not_imported():
    code = (
        "import sys; from droidspeak.tracing import span\n"
        "with span('x', {}) as traced: traced.set({'a': 1})\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
