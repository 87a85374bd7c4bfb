"""The connector as a whole: what one process saves another one loads, and everything is counted."""

from __future__ import annotations

import logging

import pytest
import torch

from droidspeak.connector import Connector, ConnectorOptions, Match, Outcome, Reason, Status
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.storage import Slot, SlotKind, TieredStore
from droidspeak.storage.disk import DiskTier

from .models import LAYERS, SIZE, memory, model, prompt, rows

ME, SENDER = model("me"), model("sender")
IDS = prompt(3)


def connector(store, plan: str = "2-3") -> Connector:
    policy = Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse(plan, LAYERS))
    return Connector(store, PolicySet([policy]), ConnectorOptions(chunk_size=SIZE))


def save(saving: Connector, source, tokens: int) -> None:
    session = saving.save(IDS, source)
    for layer in range(LAYERS):
        k, v, e = (rows(source, Slot(kind, layer), tokens) for kind in (SlotKind.K, SlotKind.V, SlotKind.E))
        session.put(layer, k, v, e if layer in session.e_layers else None)
    session.finish(wait=True)


@pytest.mark.parametrize("kind", ["memory", "disk", "tiered"])
def test_saved_then_shared(kind, tmp_path):
    def tiers():
        disk = None if kind == "memory" else DiskTier(tmp_path, min_free=0)
        return {"memory": memory, "disk": lambda: disk, "tiered": lambda: TieredStore([memory(), disk])}[
            kind
        ]()

    store = tiers()
    with store:
        save(connector(store), SENDER, 3 * SIZE)
        save(connector(store), ME, SIZE)
        if kind == "tiered":
            store.flush()
        loading = connector(store)
        match = loading.lookup(IDS, ME)
        assert (match.exact_tokens, match.shared_tokens) == (SIZE, 2 * SIZE)
        with loading.load(match) as stream:
            assert torch.equal(stream.e(2), rows(SENDER, Slot(SlotKind.E, 2), 3 * SIZE)[SIZE:])
            for layer in range(2):
                k, v = stream.kv(layer)
                for got, slot in zip((k, v), Slot.kv([layer]), strict=True):
                    assert torch.equal(got[:SIZE], rows(ME, slot, SIZE))
                    assert torch.equal(got[SIZE:], rows(SENDER, slot, 3 * SIZE)[SIZE:])


def test_every_answer_is_counted_and_logged(caplog):
    counting = connector(memory())
    plan = Plan.parse("2-3", LAYERS)
    outcomes = [
        Outcome(Reason.EXACT_HIT, 50, exact_tokens=48, bytes_loaded=100),
        Outcome(Reason.CROSS_MODEL_HIT, 50, 16, 32, plan, "source", 200, 0.1),
        Outcome(Reason.CORRUPT, 50, bytes_loaded=7),
        Outcome(Reason.NO_POLICY, 50),
        Outcome(Reason.MISS, 50),
    ]
    with caplog.at_level(logging.DEBUG, logger="droidspeak"):
        asked = Match(ME, Reason.MISS, 50, SIZE)
        assert [counting.record(outcome, asked) for outcome in outcomes] == outcomes
    me = ME.source_id[:12]
    assert counting.counters.snapshot() == {
        "bytes_loaded": {"": 307},
        "exact_tokens": {"": 64},
        # The sender has no policy here.
        "hit_tokens": {f"{me} {me}": 64, f"other {me}": 32},
        "layers": {"recompute": 2, "reuse": LAYERS - 2},
        "reasons": {"corrupt": 1, "cross_model_hit": 1, "exact_hit": 1, "miss": 1, "no_policy": 1},
        "requests": {"applied": 2, "fallback_reprefill": 2, "unsupported": 1},
        "shared_tokens": {"source": 32},
        "wait_ns": {"": 100_000_000},
    }
    assert len(caplog.records) == len(outcomes)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_counted_under_its_status(reason):
    counting = connector(memory())
    counting.record(Outcome(reason, 1))
    assert counting.counters.get("requests", reason.status.value) == 1
    assert counting.counters.get("requests") == 1
    assert counting.counters.get("reasons", reason.value) == 1
    assert reason.status in Status


def test_closing_leaves_the_store_open():
    store = memory()
    saving = connector(store)
    save(saving, ME, 3 * SIZE)
    saving.close()
    assert store.usage().chunks == 3
    assert saving.lookup(IDS, ME)


def test_policies_may_come_later():
    store = memory()
    saving = Connector(store, options=ConnectorOptions(chunk_size=SIZE))
    assert saving.save(IDS, SENDER).e_layers == set()
    saving.policies.add(Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse("2-3", LAYERS)))
    assert saving.save(IDS, SENDER).e_layers == {2}
