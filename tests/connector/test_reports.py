"""Reports: figures by pair, documents that add up, and a process that leaves them and is not held up."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droidspeak.connector import Connector, ConnectorOptions, Match, Outcome, Reason
from droidspeak.connector.reporter import Reporter
from droidspeak.connector.reports import (
    NEW_AFTER,
    OTHER,
    Report,
    Sums,
    counts_of,
    encoded,
    fold_reports,
    pairs_of,
    parse_report,
    read_reports,
)
from droidspeak.errors import ConfigError, TierUnavailable
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.storage import Counters, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.reports import MOST_REPORT_BYTES, TOTAL
from droidspeak.storage.wrappers import FaultyTier, fail

from .models import LAYERS, SIZE, fill, memory, model, prompt

ME, SENDER = model("me"), model("sender")
IDS = prompt(4)
NOW = datetime(2026, 11, 1, tzinfo=UTC)


def connector(store, plan: str = "2-3", **options) -> Connector:
    policy = Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse(plan, LAYERS))
    options = {"chunk_size": SIZE, "report_interval": 0.01, **options}
    return Connector(store, PolicySet([policy]), ConnectorOptions(**options))


def served(serving: Connector) -> Match:
    """One request, answered with all that its match promises."""
    match = serving.lookup(IDS, ME)
    with serving.load(match) as stream:
        plan = match.plan
        for layer in plan.transition_layers if plan else ():
            stream.e(layer)
        for layer in range(LAYERS):
            stream.kv(layer)
    outcome = Outcome(
        match.reason,
        match.length,
        match.exact_tokens,
        match.shared_tokens,
        match.plan,
        match.source,
        stream.bytes_loaded,
    )
    serving.record(outcome, match)
    return match


def disk(tmp_path) -> DiskTier:
    return DiskTier(tmp_path, min_free=0)


def pairs_in(store) -> dict[tuple[str, str], dict[str, float]]:
    return {
        (pair.sender, pair.receiver): pair.model_dump(exclude={"sender", "receiver"})
        for pair in pairs_of(read_reports(store.reports()))
    }


# What a process tells


def test_a_process_leaves_what_it_got_from_whom(tmp_path):
    with disk(tmp_path) as store:
        fill(store, ME, IDS, only=[0])
        fill(store, SENDER, IDS, e_layers=[2])
        serving = connector(store, report_interval=60)
        match = served(serving)
        served(serving)
        assert (match.exact_tokens, match.shared_tokens) == (SIZE, 3 * SIZE)
        assert list(store.reports()) == []
        serving.close()
        found = pairs_in(store)
        own, shared = found[ME.source_id, ME.source_id], found[SENDER.source_id, ME.source_id]
    assert (own["requests"], own["tokens"], own["tokens_saved"]) == (2, 2 * SIZE, 2 * SIZE)
    assert (shared["requests"], shared["tokens"]) == (2, 6 * SIZE)
    # Two of four layers are recomputed.
    assert shared["tokens_saved"] == 6 * SIZE / 2
    # Rows as they are stored: K and V are 2 heads x 4 x 4 bytes each, E is 8 x 4.
    assert own["bytes_loaded"] == 2 * SIZE * LAYERS * 64
    assert shared["bytes_loaded"] == 2 * 3 * SIZE * (2 * 64 + 32)
    assert own["bytes_unstored"] == 0
    # The second request used the same chunks.
    assert shared["bytes_unstored"] == sum(info.nbytes for info in match.shared)


def test_the_report_says_who_tells_and_what_else_happened(tmp_path):
    store = TieredStore([memory(), disk(tmp_path)])
    with store:
        fill(store, SENDER, IDS, e_layers=[2])
        store.flush()
        policy = Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse("2-3", LAYERS))
        options = ConnectorOptions(chunk_size=SIZE, report_interval=60)
        serving = Connector(store, PolicySet([policy]), options, engine="mine")
        served(serving)
        serving.record(Outcome(Reason.MISS, 5), serving.lookup([1, 2, 3], ME))
        serving.close()
        serving.close()
        (report,) = read_reports(store.reports())
    assert (report.engine, report.ended, report.processes) == ("mine", True, 1)
    assert report.counters["requests"] == {"applied": 1, "fallback_reprefill": 1}
    assert report.counters["reasons"] == {"cross_model_hit": 1, "miss": 1}
    assert report.counters["lookups"] == {"cross_model_hit": 1, "too_short": 1}
    assert report.events["hits"]["cpu"] > 0
    (tier,) = report.tiers.values()
    assert tier.bytes > 0
    assert tier.seconds > 0


def test_connectors_of_one_store_tell_of_its_events_once(tmp_path):
    store = TieredStore([memory(), disk(tmp_path)])
    with store:
        fill(store, ME, IDS)
        both = [connector(store, report_interval=60) for _ in range(2)]
        for serving in both:
            served(serving)
        for serving in both:
            serving.close()
        told = [report.events for report in read_reports(store.reports())]
        assert sorted(map(bool, told)) == [False, True]
        assert counts_of(read_reports(store.reports()))["event", "hits", "cpu"] == store.counters.get("hits")


def test_a_failed_load_saves_nothing(tmp_path):
    with disk(tmp_path) as store:
        fill(store, SENDER, IDS, e_layers=[2])
        serving = connector(store, report_interval=60)
        match = serving.lookup(IDS, ME)
        serving.record(Outcome(Reason.CORRUPT, len(IDS), bytes_loaded=7), match)
        serving.close()
        assert pairs_in(store) == {}


def test_reports_come_while_there_is_traffic(tmp_path):
    with disk(tmp_path) as store:
        fill(store, ME, IDS)
        told = threading.Event()
        put = store.put_report

        def noted(name, data):
            kept = put(name, data)
            if parse_report(data).counters.get("requests") == {"applied": 3}:
                told.set()
            return kept

        store.put_report = noted
        serving = connector(store)
        for _ in range(3):
            served(serving)
        assert told.wait(60)
        (report,) = read_reports(store.reports())
        assert not report.ended
        serving.close()
        (report,) = read_reports(store.reports())
        assert report.ended
        assert pairs_in(store)[ME.source_id, ME.source_id]["requests"] == 3


@pytest.mark.parametrize("kind", ["no traffic", "switched off", "memory only"])
def test_where_there_is_nothing_to_keep(kind, tmp_path):
    store = memory() if kind == "memory only" else disk(tmp_path)
    with store:
        fill(store, ME, IDS)
        serving = connector(store, report_interval=0 if kind == "switched off" else 0.01)
        if kind != "no traffic":
            served(serving)
        serving.close()
        assert list(store.reports()) == []
        assert serving.counters.get("report_failures") == 0


def test_a_store_that_cannot_keep_reports_fails_no_request(tmp_path):
    plan = {"put_report": [fail(TierUnavailable("full"))] * 1000}
    with FaultyTier(disk(tmp_path), plan) as store:
        fill(store, ME, IDS)
        serving = connector(store)
        for _ in range(3):
            assert served(serving)
        serving.close()
        assert serving.counters.get("report_failures") >= 1
        assert serving.counters.get("requests", "applied") == 3


def test_a_store_that_hangs_holds_no_request(tmp_path):
    began, go_on = threading.Event(), threading.Event()

    def hang(_call):
        began.set()
        go_on.wait(60)
        raise TierUnavailable("late")

    with FaultyTier(disk(tmp_path), {"put_report": [hang]}) as store:
        fill(store, ME, IDS)
        serving = connector(store)
        served(serving)
        assert began.wait(60)
        served(serving)
        assert serving.counters.get("requests", "applied") == 2
        go_on.set()
        serving.close()


@pytest.mark.parametrize("kind", ["store", "tier"])
def test_no_report_is_tried_once_the_store_is_closed(tmp_path, kind):
    tried = []

    class Noting(DiskTier):
        def put_report(self, name, data):
            tried.append(name)
            return super().put_report(name, data)

    tier = Noting(tmp_path, min_free=0)
    store = TieredStore([tier]) if kind == "store" else tier
    serving = connector(store, report_interval=60)
    reporter = serving._reporter
    match, outcome = Match(ME, Reason.EXACT_HIT, 5, SIZE), Outcome(Reason.EXACT_HIT, 5, exact_tokens=SIZE)
    reporter._hand_over()
    assert (len(tried), serving.counters.get("report_failures")) == (1, 0)
    store.close()
    reporter._hand_over()
    assert serving.counters.get("report_failures") == 1
    before = len(tried)
    for _ in range(3):
        serving.record(outcome, match)
        assert reporter._thread is None
    serving.close()
    assert (len(tried), serving.counters.get("report_failures")) == (before, 1)
    assert serving.counters.get("requests", "applied") == 3


def test_what_was_not_kept_comes_with_the_next(tmp_path):
    with FaultyTier(disk(tmp_path), {"put_report": [fail(TierUnavailable("no"))]}) as store:
        fill(store, ME, IDS)
        serving = connector(store, report_interval=60)
        reporter = serving._reporter
        served(serving)
        reporter._hand_over()
        assert list(store.reports()) == []
        served(serving)
        serving.close()
        assert pairs_in(store)[ME.source_id, ME.source_id]["requests"] == 2


def test_who_was_silent_for_long_begins_a_new_document(tmp_path):
    clock = [NOW]
    with disk(tmp_path) as store:
        reporter = Reporter(store, "mine", 60, Counters(), now=lambda: clock[0])
        match = Match(ME, Reason.EXACT_HIT, 5, SIZE)
        for wait in (timedelta(0), NEW_AFTER / 2, NEW_AFTER * 2):
            clock[0] += wait
            reporter.record(Outcome(Reason.EXACT_HIT, 5, exact_tokens=SIZE), match)
            reporter._hand_over()
        second, first = read_reports(store.reports())
        assert [report.pairs[0].tokens for report in (first, second)] == [2 * SIZE, SIZE]
        assert second.started == first.updated
        assert pairs_of([first, second])[0].tokens == 3 * SIZE
        reporter.close()


def test_an_interval_that_is_none():
    with pytest.raises(ConfigError, match="report interval -1 s"):
        ConnectorOptions(report_interval=-1)


# Documents


def report(tokens: int = 1, *, updated: datetime = NOW, pair=(SENDER, ME), **rest) -> Report:
    names = {"sender": pair[0].source_id, "receiver": pair[1].source_id}
    content = {"pairs": [{**names, "requests": 1, "tokens": tokens, "tokens_saved": tokens / 2}], **rest}
    return Report.model_validate(
        {"id": uuid.uuid4().hex, "engine": "mine", "started": NOW, "updated": updated, **content}
    )


def documents(*reports: Report) -> dict[str, bytes]:
    return {TOTAL if one.engine == TOTAL else one.id: encoded(one) for one in reports}


def tokens_in(found: dict[str, bytes]) -> int:
    return sum(pair.tokens for pair in pairs_of(read_reports(found.items())))


def test_a_copy_of_a_document_does_not_count():
    early, late = report(3), None
    late = early.model_copy(update={"updated": NOW + timedelta(1), "pairs": report(5).pairs})
    assert tokens_in({"a": encoded(early), "b": encoded(late), "c": encoded(early)}) == 5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        encoded(report()).replace(b"report-1", b"report-2"),
        encoded(report()).replace(b'"tokens":1', b'"tokens":-1'),
        encoded(report()).replace(b'"tokens":1', b'"tokens":1e400'),
        encoded(report()).replace(b'"engine"', b'"motor"'),
    ],
)
def test_what_is_no_document_is_passed_over(data):
    assert parse_report(data) is None
    assert tokens_in({"odd": data, **documents(report(2))}) == 2


def test_few_documents_are_left_as_they_are():
    assert fold_reports(documents(*(report(ended=True) for _ in range(64)))) is None


def test_processes_that_ended_are_folded_and_those_alive_are_not():
    ended = [report(1, ended=True) for _ in range(60)]
    killed = [report(1, updated=NOW - timedelta(hours=2)) for _ in range(5)]
    alive = [report(1), report(1, updated=NOW - timedelta(minutes=30))]
    found = documents(*ended, *killed, *alive)
    folded = fold_reports(found, NOW)
    assert folded is not None
    assert set(folded.gone) == {one.id for one in (*ended, *killed)}
    total = parse_report(folded.total)
    assert (total.processes, total.pairs[0].tokens, total.drift) == (65, 65, ())
    # At every moment of the fold the sum is the same: before, with the total beside them, and after.
    assert tokens_in({**found, TOTAL: folded.total}) == 67
    left = {name: data for name, data in found.items() if name not in folded.gone}
    assert tokens_in({**left, TOTAL: folded.total}) == 67


def test_a_fold_that_was_cut_off_is_gone_on_with():
    found = documents(*(report(1, ended=True) for _ in range(70)))
    first = fold_reports(found, NOW)
    # The total was written, half of the others were taken away, and the process died.
    left = dict(list(found.items())[:35])
    more = documents(*(report(1, ended=True) for _ in range(40)))
    again = fold_reports({**left, **more, TOTAL: first.total}, NOW)
    assert set(again.gone) == {*left, *more}
    assert parse_report(again.total).pairs[0].tokens == 110
    assert tokens_in({**left, TOTAL: again.total}) == 110


def test_a_total_that_cannot_be_read_is_not_replaced():
    found = documents(*(report(1, ended=True) for _ in range(70)))
    assert fold_reports({**found, TOTAL: b'{"format": "droidspeak-report-2"}'}, NOW) is None


def test_documents_stay_small():
    models = [model(f"m{n}") for n in range(600)]
    sums = Sums()
    for n, one in enumerate(models):
        sums.add({("pair", one.source_id, ME.source_id, name): n for name in ("requests", "tokens")})
    whole = Report.of(sums, id="0" * 32, engine="mine", started=NOW, updated=NOW)
    assert len(encoded(whole)) < MOST_REPORT_BYTES
    assert whole.pairs[-1].sender == whole.pairs[-1].receiver == OTHER
    assert sum(pair.tokens for pair in whole.pairs) == sum(range(600))
    # What was left over once stays so when documents are added up.
    twice = Report.of(counts_of([whole, whole]), id="0" * 32, engine=TOTAL, started=NOW, updated=NOW)
    assert twice.sums() == {path: 2 * value for path, value in whole.sums().items()}


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 3), st.booleans()), max_size=120
    )
)
def test_folding_at_any_time_changes_no_sum(rows):
    """Documents come and go through folds, some cut off in the middle; nothing is lost or counted twice."""
    models = [model(f"m{n}") for n in range(4)]
    found: dict[str, bytes] = {}
    expected = Fraction(0)
    for n, tokens, hours, cut in rows:
        one = report(tokens, updated=NOW - timedelta(hours=hours), pair=(models[n], models[n - 1]), ended=cut)
        found[one.id] = encoded(one)
        expected += tokens
        folded = fold_reports(found, NOW)
        if folded is not None:
            found[TOTAL] = folded.total
            for name in list(folded.gone)[: len(folded.gone) // 2 if cut else None]:
                del found[name]
        assert tokens_in(found) == expected
