"""Bandwidth of tiers, as streams measure it, and what the choice of a plan makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.connector import Connector, ConnectorOptions, Reason
from droidspeak.connector.bandwidth import Bandwidths, Transfer, TransferClock
from droidspeak.errors import LoadFailed
from droidspeak.layerselect import Costs, FrontierPoint, Plan, Policy, PolicySet, Requirement
from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.wrappers import FaultyTier, LatencyTier, hang, short

from .models import DIM, HEADS, HIDDEN, LAYERS, SIZE, fill, memory, model, prompt

ME, SENDER = model("me"), model("sender")
IDS = prompt(4)
LAYER_BYTES = 4 * SIZE * 2 * HEADS * DIM * 4
E_BYTES = 4 * SIZE * HIDDEN * 4


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


# One stream


def test_reads_at_one_time_from_one_tier_count_once():
    hands = Hands()
    clock = TransferClock(hands)
    clock.start("disk")
    hands.time = 1
    clock.start("disk")
    clock.start("s3")
    hands.time = 3
    clock.stop("disk", 10)
    hands.time = 4
    clock.stop("disk", 20)
    hands.time = 9
    clock.stop("s3", 5)
    clock.start("disk")
    hands.time = 11
    clock.stop("disk", 70)
    assert set(clock.transfers()) == {Transfer("disk", 100, 6), Transfer("s3", 5, 8)}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_seconds_are_those_in_which_any_read_was_under_way(reads):
    spans = [(start, start + length) for start, length in reads]
    hands = Hands()
    clock = TransferClock(hands)
    for moment in range(20):
        hands.time = moment
        for start, end in spans:
            if start == moment:
                clock.start("disk")
            if end == moment:
                clock.stop("disk", 1)
    busy = {moment for start, end in spans for moment in range(start, end)}
    assert list(clock.transfers()) == [Transfer("disk", len(reads), len(busy))]


# Estimates


def test_newer_transfers_count_more():
    bandwidths = Bandwidths()
    assert bandwidths.get("disk") is None
    bandwidths.add(Transfer("disk", 100, 1.0))
    assert bandwidths.get("disk") == pytest.approx(100)
    for _ in range(20):
        bandwidths.add(Transfer("disk", 100, 4.0))
    assert bandwidths.get("disk") == pytest.approx(25, rel=0.01)
    assert bandwidths.get("s3") is None


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-6, 1e3)), min_size=1, max_size=9))
def test_an_estimate_lies_between_the_slowest_and_the_fastest(transfers):
    bandwidths = Bandwidths()
    for nbytes, seconds in transfers:
        bandwidths.add(Transfer("disk", nbytes, seconds))
    speeds = [nbytes / seconds for nbytes, seconds in transfers]
    assert min(speeds) * 0.999 <= bandwidths.get("disk") <= max(speeds) * 1.001


def test_transfers_of_nothing_or_in_no_time_tell_nothing():
    bandwidths = Bandwidths()
    bandwidths.add(Transfer("disk", 0, 1.0))
    bandwidths.add(Transfer("disk", 1, 0.0))
    assert bandwidths.get("disk") is None


def test_an_estimate_is_forgotten():
    hands = Hands()
    bandwidths = Bandwidths(hands)
    bandwidths.add(Transfer("disk", 1, 1.0))
    hands.time = 60
    assert bandwidths.get("disk") == 1
    hands.time = 61
    assert bandwidths.get("disk") is None
    bandwidths.add(Transfer("disk", 8, 1.0))
    assert bandwidths.get("disk") == 8


def test_chunks_in_several_tiers():
    bandwidths = Bandwidths()
    bandwidths.add(Transfer("cpu", 300, 1.0))
    bandwidths.add(Transfer("disk", 100, 1.0))
    assert bandwidths.over(["cpu", "cpu"]) == pytest.approx(300)
    assert bandwidths.over(["cpu", "disk"]) == pytest.approx(150)
    assert bandwidths.over(["cpu", "s3"]) is None
    assert bandwidths.over([]) is None


# Streams


def connector(store, *points: str, costs: Costs | None = None, **options) -> Connector:
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), 1.0) for text in points or ("reuse",))
    policy = Policy(SENDER.source_id, ME.source_id, frontier, costs=costs)
    return Connector(store, PolicySet([policy]), ConnectorOptions(chunk_size=SIZE, **options))


def load(sharing: Connector, match=None) -> None:
    match = match or sharing.lookup(IDS, ME)
    plan = match.plan or Plan.parse("reuse", LAYERS)
    with sharing.load(match) as stream:
        for layer in plan.transition_layers:
            stream.e(layer)
        for layer in plan.loaded:
            stream.kv(layer)


@pytest.fixture
def transfers(monkeypatch):
    """What streams report."""
    seen: list[Transfer] = []
    add = Bandwidths.add
    monkeypatch.setattr(Bandwidths, "add", lambda self, one: (seen.append(one), add(self, one))[1])
    return seen


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_decoded_bytes_are_counted(transfers, codec):
    store = memory()
    fill(store, SENDER, IDS, e_layers=[1], codec=codec)
    sharing = connector(store, "1-2")
    load(sharing)
    assert [(one.tier, one.nbytes) for one in transfers] == [("cpu", 2 * LAYER_BYTES + E_BYTES)]
    assert sharing.bandwidths.get("cpu") > 0


def test_each_tier_is_measured_by_its_own_bytes(tmp_path, transfers):
    disk = DiskTier(tmp_path, min_free=0)
    fill(disk, SENDER, IDS, only=[1, 2, 3])
    fast = memory()
    fill(fast, SENDER, IDS, only=[0])
    with TieredStore([fast, disk], promote=False) as store:
        sharing = connector(store)
        load(sharing)
    parts = {one.tier: one.nbytes for one in transfers}
    assert parts == {"cpu": LAYERS * LAYER_BYTES // 4, "disk": LAYERS * LAYER_BYTES * 3 // 4}


def test_own_chunks_are_measured_too(transfers):
    store = memory()
    fill(store, ME, IDS)
    load(connector(store))
    assert [one.nbytes for one in transfers] == [LAYERS * LAYER_BYTES]


def test_a_stream_that_fails_tells_nothing(transfers):
    inner = memory()
    fill(inner, SENDER, IDS)
    sharing = connector(FaultyTier(inner, {"read": [None, short]}), loaders=1)
    with pytest.raises(LoadFailed):
        load(sharing)
    assert transfers == []


def test_a_stream_that_is_closed_early_tells_nothing(transfers):
    inner = memory()
    fill(inner, SENDER, IDS)
    sharing = connector(FaultyTier(inner, {"read": [hang(0.05)] * 4}), loaders=1)
    sharing.load(sharing.lookup(IDS, ME)).close()
    sharing.flush()
    assert transfers == []


# The choice


# At 200 kB/s the 4 layers of 4 chunks take as long as recomputing them.
COSTS = Costs(per_token=LAYERS * LAYER_BYTES / 200_000 / (4 * SIZE) / 4)


def plans_after_loading(store) -> tuple[str, str]:
    """The plan for the first request, and for one that comes after it was loaded."""
    sharing = connector(store, "0-0", "0-2", costs=COSTS)
    first = sharing.lookup(IDS, ME)
    load(sharing, first)
    return str(first.plan), str(sharing.lookup(IDS, ME).plan)


def test_a_fast_tier_gets_the_plan_with_the_fewest_layers():
    store = memory()
    fill(store, SENDER, IDS)
    assert plans_after_loading(store) == ("0-0", "0-0")


def test_a_slow_tier_gets_a_plan_with_more_recompute():
    inner = memory()
    fill(inner, SENDER, IDS)
    # 3 layers in 4 reads by 2 loaders: 12 KiB in no less than 0.6 s.
    assert plans_after_loading(LatencyTier(inner, delay=0.3)) == ("0-0", "0-2")


def test_the_tier_that_holds_the_chunks_decides(tmp_path):
    slow = LatencyTier(DiskTier(tmp_path, min_free=0), delay=0.3)
    fill(slow, SENDER, IDS)
    fast = memory()
    with TieredStore([fast, slow], promote=False) as store:
        assert plans_after_loading(store) == ("0-0", "0-2")
        fill(fast, SENDER, IDS)
        assert plans_after_loading(store) == ("0-0", "0-0")


def test_a_queue_gets_the_fewest_layers_however_slow_the_tier_is():
    store = memory()
    fill(store, SENDER, IDS)
    sharing = connector(store, "0-0", "0-2", costs=COSTS)
    sharing.bandwidths.add(Transfer("cpu", 1000, 1.0))
    assert str(sharing.lookup(IDS, ME).plan) == "0-2"
    assert str(sharing.lookup(IDS, ME, queue_depth=1).plan) == "0-0"


def test_full_prefill_is_chosen_where_it_is_faster_or_in_time():
    store = memory()
    fill(store, SENDER, IDS)
    sharing = connector(store, "0-0", "full", costs=COSTS)
    assert sharing.lookup(IDS, ME).reason is Reason.CROSS_MODEL_HIT
    patient = Requirement(slo=1e6)
    assert sharing.lookup(IDS, ME, requirement=patient).reason is Reason.PREFILL_CHOSEN
    assert sharing.lookup(IDS, ME, requirement=patient, queue_depth=1).reason is Reason.CROSS_MODEL_HIT
    sharing.bandwidths.add(Transfer("cpu", 10, 1.0))
    match = sharing.lookup(IDS, ME)
    assert (match.reason, bool(match), match.plan) == (Reason.PREFILL_CHOSEN, False, None)
    fill(store, ME, IDS, only=[0])
    assert sharing.lookup(IDS, ME).reason is Reason.EXACT_HIT
