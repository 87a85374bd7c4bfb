"""Lookup with a drift guard: a drifted pair's match is withheld, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

from droidspeak.connector import Connector, ConnectorOptions, Reason, Status
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.layerselect.drift import DriftGuard, DriftOptions

from .models import LAYERS, SIZE, fill, memory, model, prompt

ME, SENDER, OTHER = model("me"), model("sender"), model("other")
IDS = prompt(4)


def policy(sender=SENDER) -> Policy:
    return Policy.fixed(sender.source_id, ME.source_id, Plan.parse("0-1", LAYERS))


def guarded(store, *policies: Policy) -> Connector:
    options = ConnectorOptions(chunk_size=SIZE)
    return Connector(store, PolicySet(policies), options, guard=DriftGuard(DriftOptions(window=8)))


def turn(connector: Connector, policy: Policy, sample: tuple[float, float]) -> None:
    assert any(connector.guard.observe(policy, *sample) for _ in range(8))


def test_a_drifted_pair_falls_back_and_comes_back():
    store = memory()
    fill(store, SENDER, IDS)
    connector = guarded(store, policy())
    served = connector.lookup(IDS, ME)
    assert served.reason is Reason.CROSS_MODEL_HIT
    turn(connector, policy(), (0.0, 9.0))
    match = connector.lookup(IDS, ME)
    assert not match
    assert (match.reason, match.reason.status) == (Reason.DRIFT, Status.FALLBACK_REPREFILL)
    assert match == replace(served.without_chunks(Reason.DRIFT), withheld=served)
    with connector.load(match.withheld) as stream:
        assert stream.kv(LAYERS - 1)[0].shape[0] == 4 * SIZE
    turn(connector, policy(), (1.0, 0.0))
    assert connector.lookup(IDS, ME) == served


def test_own_chunks_are_used_all_the_same():
    store = memory()
    fill(store, ME, IDS, only=[0])
    fill(store, SENDER, IDS)
    connector = guarded(store, policy())
    turn(connector, policy(), (0.0, 9.0))
    match = connector.lookup(IDS, ME)
    assert (match.reason, match.exact_tokens, match.shared_tokens) == (Reason.EXACT_HIT, SIZE, 0)
    assert (match.plan, match.source, match.policy) == (None, None, None)
    assert (match.withheld.exact_tokens, match.withheld.shared_tokens) == (SIZE, 3 * SIZE)


def test_another_pair_steps_in_even_with_less():
    store = memory()
    fill(store, SENDER, IDS)
    fill(store, OTHER, IDS, only=[0, 1])
    connector = guarded(store, policy(), policy(OTHER))
    assert connector.lookup(IDS, ME).source == SENDER.source_id
    turn(connector, policy(), (0.0, 9.0))
    match = connector.lookup(IDS, ME)
    assert (match.source, match.shared_tokens, match.withheld) == (OTHER.source_id, 2 * SIZE, None)
    turn(connector, policy(OTHER), (0.0, 9.0))
    match = connector.lookup(IDS, ME)
    assert (match.reason, match.withheld.source) == (Reason.DRIFT, SENDER.source_id)


def test_what_a_drifted_pair_does_not_have_is_not_withheld():
    connector = guarded(memory(), policy())
    turn(connector, policy(), (0.0, 9.0))
    match = connector.lookup(IDS, ME)
    assert (match.reason, match.withheld) == (Reason.MISS, None)


def test_a_request_for_own_caches_only_is_not_withheld_anything():
    store = memory()
    fill(store, SENDER, IDS)
    connector = guarded(store, policy())
    turn(connector, policy(), (0.0, 9.0))
    match = connector.lookup(IDS, ME, share=False)
    assert (match.reason, match.withheld) == (Reason.OPTED_OUT, None)
