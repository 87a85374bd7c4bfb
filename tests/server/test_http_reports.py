"""Engines' reports over HTTP: what is kept, for whom, and what is refused."""

from __future__ import annotations

import json
import uuid

import pytest

from droidspeak.connector.reports import encoded, pairs_of, parse_report, read_reports
from droidspeak.storage.remote import RemoteTier
from droidspeak.storage.reports import MOST_REPORT_BYTES, TOTAL

from .httpclient import disk, lines_of, memory, say, serving, store_of
from .pagestore import pair, report
from .test_http_auth import token, token_of

PATH = "/v1/reports"


@pytest.fixture
def served(tmp_path):
    with serving(store_of(memory(), disk(tmp_path))) as served:
        yield served


def put(client, one, **changes):
    content = {**one.model_dump(mode="json"), **changes}
    return client.ask("PUT", f"{PATH}/{one.id}", content)


def held(client) -> dict[str, dict]:
    return {row["name"]: row["report"] for row in lines_of(client.ask("GET", PATH))}


def test_what_is_put_is_listed(served):
    assert held(served.client) == {}
    one, other = report(pair("a", "b", 512)), report(ended=True)
    for kept in (one, other):
        assert put(served.client, kept).status == 204
    assert put(served.client, one, pid=7).status == 204
    found = held(served.client)
    assert found == {
        one.id: {**one.model_dump(mode="json"), "pid": 7},
        other.id: other.model_dump(mode="json"),
    }
    assert served.store.usage().chunks == 0


def test_many_of_ended_processes_become_one(served):
    for _ in range(70):
        assert put(served.client, report(pair("a", "b", 512), age=1, ended=True)).status == 204
    found = held(served.client)
    assert TOTAL in found
    assert len(found) < 65
    documents = [(name, json.dumps(row).encode()) for name, row in found.items()]
    assert pairs_of(read_reports(documents))[0].tokens == 70 * 512


def test_a_store_of_memory_keeps_none():
    with serving(store_of(memory())) as served:
        assert put(served.client, report()).refusal == (404, "not_found")
        assert held(served.client) == {}
        with RemoteTier("127.0.0.1", served.server.port) as tier:
            one = report()
            assert tier.put_report(one.id, encoded(one)) is False


@pytest.mark.parametrize("name", ["total", "a", "A" * 32, "0" * 31, "..%2f..%2fetc", "%00" * 32])
def test_names_that_are_none(served, name):
    answer = served.client.ask("PUT", f"{PATH}/{name}", report().model_dump(mode="json"))
    assert answer.refusal[0] in (404, 422)
    assert held(served.client) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"format": "droidspeak-report-1"}',
        b"[" * 5000,
    ],
)
def test_bodies_that_are_no_report(served, body):
    headers = {"Content-Type": "application/json"}
    answer = served.client.ask("PUT", f"{PATH}/{uuid.uuid4().hex}", body, headers)
    assert answer.refusal[0] in (400, 422)
    assert answer.refusal[1] == "bad_request"
    assert held(served.client) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "droidspeak-report-2"},
        {"id": "1" * 32},
        {"pid": -1},
        {"pid": "7"},
        {"processes": True},
        {"updated": 0},
        {"updated": "2026-11-01T00:00:00"},
        {"host": "x" * 201},
        {"surplus": 1},
        {"pairs": [{"sender": "me", "receiver": "b" * 64}]},
        {"pairs": [{"sender": "a" * 64, "receiver": "b" * 64, "tokens": -1}]},
        {"pairs": [{"sender": "a" * 64, "receiver": "b" * 64, "tokens_saved": 1e999}]},
        {"pairs": [{"sender": "a" * 64, "receiver": "b" * 64}] * 300},
        {"counters": {"requests": {"applied": 1.5}}},
        {"folded": ["0" * 32] * 2000},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)
def test_reports_that_are_not_allowed(served, changes):
    assert put(served.client, report(), **changes).refusal[0] == 422
    assert held(served.client) == {}


def test_a_body_that_is_too_large_is_not_read(served):
    path = f"{PATH}/{uuid.uuid4().hex}"
    answer = say(served.server.port, f"PUT {path} HTTP/1.1", "Content-Length: 2000000")
    assert answer.refusal == (413, "too_large")
    odd = {"x" * 190 + str(n): {"y" * 190 + str(m): 1 for m in range(256)} for n in range(64)}
    one = report(counters=dict(list(odd.items())[:10]))
    assert len(encoded(one)) > MOST_REPORT_BYTES
    assert put(served.client, one).refusal == (413, "too_large")
    assert held(served.client) == {}


def test_what_lies_in_the_folder_and_is_no_report_is_not_told(served, tmp_path):
    put(served.client, report())
    (tmp_path / "reports" / "odd.json").write_text("<html>")
    assert len(held(served.client)) == 1


def test_tenants_are_apart(tmp_path):
    stores = {"": store_of(disk(tmp_path / "own")), "acme": store_of(disk(tmp_path / "acme"), name="acme")}
    tokens = [token("all", "read", "write"), token("acme", "read", "write", tenant="acme")]
    with serving(stores, tokens=tokens) as served:
        ours, theirs = (served.as_caller(token_of(name)) for name in ("all", "acme"))
        one = report()
        assert put(theirs, one).status == 204
        assert set(held(theirs)) == {one.id}
        assert held(ours) == {}


def test_an_engine_tells_through_a_daemon(served, tmp_path):
    """The whole way: a connector over a remote tier, and the report on the daemon's disk."""
    from droidspeak.connector import Connector, ConnectorOptions, Match, Outcome, Reason
    from tests.connector.models import SIZE, model

    me = model("me")
    with RemoteTier("127.0.0.1", served.server.port) as tier:
        serving_model = Connector(tier, options=ConnectorOptions(chunk_size=SIZE, report_interval=60))
        match = Match(me, Reason.EXACT_HIT, 2 * SIZE, SIZE)
        serving_model.record(Outcome(Reason.EXACT_HIT, 2 * SIZE, exact_tokens=SIZE), match)
        serving_model.close()
        told = [parse_report(data) for _, data in tier.reports()]
    assert [one.pairs[0].tokens for one in told] == [SIZE]
    assert len(list((tmp_path / "reports").glob("*.json"))) == 1
