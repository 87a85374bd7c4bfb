"""Shadow prefill: what it measures, what it leaves alone, and a real shift of what users ask."""

from __future__ import annotations

import copy
import logging
import threading
import time
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

from droidspeak.connector import ConnectorOptions, Match, Outcome, Reason, Status
from droidspeak.errors import TierUnavailable
from droidspeak.integrations.transformers import DroidSpeak, capture, partial_prefill
from droidspeak.integrations.transformers.answer import PromptEncoder, answer
from droidspeak.integrations.transformers.loading import eos_ids, load_model
from droidspeak.integrations.transformers.rows import Row, agreement, divergence, greedy, teacher_forced
from droidspeak.layerselect import FrontierPoint, Plan, Policy, PolicySet, Thresholds
from droidspeak.layerselect.drift import DriftGuard, DriftOptions
from droidspeak.prompts import load_prompts
from droidspeak.storage.wrappers import FaultyTier, fail

from .sharing import SIZE, ask, door, fill, memory, policy, sources_in
from .sharing import greedy as plain_greedy
from .tiny_models import tiny_model, tokens

IDS = tokens(4 * SIZE + 5, seed=1)
CUT = 4 * SIZE
MINE, THEIRS = tiny_model("llama"), tiny_model("llama", seed=7)
ALWAYS = DriftOptions(sample_rate=1, least=4, window=8)
LAB = Path(__file__).parents[2] / "lab"
OPEN: list[DroidSpeak] = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def sharing(plan: str = "1-2", store=None, mine=MINE, **options):
    """A sender and a receiver that checks every request; the pair has a policy."""
    store, policies = store or memory(), PolicySet()
    sender = door(THEIRS, store, policies)
    receiver = door(mine, store, policies, **{"drift": ALWAYS, "save": False, **options})
    policies.add(policy(sender, receiver, plan))
    OPEN.extend([sender, receiver])
    return sender, receiver


def the_policy(receiver: DroidSpeak) -> Policy:
    (only,) = receiver.connector.policies.for_receiver(receiver.manifest.source_id)
    return only


def state(receiver: DroidSpeak):
    return receiver.connector.guard.state(the_policy(receiver))


def turn(receiver: DroidSpeak) -> None:
    """Makes the pair drift."""
    guard = receiver.connector.guard
    while guard.allowed(the_policy(receiver)):
        guard.observe(the_policy(receiver), 0.0, 9.0)


def counts(receiver: DroidSpeak) -> dict[str, int]:
    counters = receiver.connector.counters.snapshot()
    return {
        name.removeprefix("drift_"): sum(table.values())
        for name, table in counters.items()
        if name.startswith("drift_")
    }


class GatedGuard(DriftGuard):
    """Holds the worker at its first sample until `gate` is set."""

    def __init__(self, options: DriftOptions) -> None:
        super().__init__(options)
        self.gate, self.reached = threading.Event(), threading.Event()

    def observe(self, *sample) -> bool:
        self.reached.set()
        assert self.gate.wait(60)
        return super().observe(*sample)


def gated(monkeypatch, **options):
    """A pair whose first sample has been taken up by the worker, and is held there."""
    monkeypatch.setattr("droidspeak.integrations.transformers.door.DriftGuard", GatedGuard)
    sender, receiver = sharing(**options)
    fill(sender, IDS)
    receiver.prefill(IDS)
    guard = receiver.connector.guard
    assert guard.reached.wait(60)
    return receiver, guard.gate


# What is measured


def measured(receiver: DroidSpeak, layers, ids=IDS) -> tuple[float, float]:
    """Agreement and divergence of a cache of the first chunks, from the primitives."""
    decoder, cut = receiver.decoder, layers[0][0].shape[0]
    suffix = tuple(ids[cut:].tolist())
    rows = [Row(capture(decoder, ids[:cut]).layers, suffix), Row(layers, suffix)]
    said = greedy(decoder, rows[:1], max_new_tokens=8, eos_ids=eos_ids(receiver.model))
    reference, logits = (teacher_forced(decoder, [row], said)[0] for row in rows)
    return agreement(reference, logits), divergence(reference, logits)


def mixed(receiver: DroidSpeak, match: Match, ids):
    """K and V of every layer as `match` says."""
    with receiver.connector.load(match) as stream:
        decoder, exact = receiver.decoder, match.exact_tokens
        return partial_prefill(match.plan, decoder, ids[: match.tokens], stream, exact_tokens=exact)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2_moe"])
def test_a_served_request_is_measured_against_the_models_own(architecture):
    store, policies = memory(), PolicySet()
    sender = door(tiny_model(architecture, seed=7), store, policies)
    receiver = door(tiny_model(architecture), store, policies, drift=ALWAYS, save=False)
    policies.add(policy(sender, receiver, "1-2"))
    fill(sender, IDS)
    with sender, receiver:
        # One sample is left out of the means.
        for _ in range(2):
            prefix = receiver.prefill(IDS)
        assert prefix.outcome.reason is Reason.CROSS_MODEL_HIT
        receiver.flush()
        agreed, kl = measured(receiver, prefix.layers)
        assert (state(receiver).agreement, state(receiver).kl) == (agreed, pytest.approx(kl, rel=1e-3))
        assert kl > 0.001


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("own_chunks", [0, 1])
def test_a_withheld_match_is_measured_the_same(save, own_chunks):
    sender, receiver = sharing(save=save)
    if own_chunks:
        fill(door(MINE, receiver.connector.store), IDS[: own_chunks * SIZE + 1])
    prompts = [torch.cat([IDS[:-1], last[None]]) for last in IDS[:2]]
    own = own_chunks * SIZE
    others = [torch.cat([IDS[:own], tokens(CUT + 5, seed=n)[own:]]) for n in (3, 4)]
    fill(sender, *prompts, *others)
    served = [receiver.prefill(prompt) for prompt in prompts]
    receiver.flush()
    assert all(prefix.outcome.shared_tokens == CUT - own_chunks * SIZE for prefix in served)
    turn(receiver)
    expected = []
    for prompt in others:
        prefix = receiver.prefill(prompt)
        receiver.flush()
        assert prefix.outcome.reason is (Reason.EXACT_HIT if own_chunks else Reason.DRIFT)
        assert (prefix.outcome.shared_tokens, prefix.outcome.source) == (0, None)
        match = receiver.connector.lookup(prompt, receiver.manifest).withheld
        assert (match is None) is save
        if match:
            expected.append(measured(receiver, mixed(receiver, match, prompt), prompt))
    found = state(receiver)
    assert found.samples == 2
    assert counts(receiver)["samples"] == 4
    assert counts(receiver)["fallbacks"] == 2
    if not save:
        assert found.kl == pytest.approx(min(kl for _, kl in expected), rel=1e-3)
        assert found.agreement == max(agreed for agreed, _ in expected)


def test_only_what_another_models_cache_served_is_checked():
    sender, receiver = sharing(save=True)
    receiver.prefill(IDS)
    receiver.flush()
    receiver.prefill(IDS)
    receiver.prefill(IDS[:3])
    fill(sender, tokens(CUT, seed=9))
    receiver.prefill(tokens(CUT, seed=9), share=False)
    receiver.flush()
    assert counts(receiver) == {}
    assert state(receiver).observed == 0


def test_a_request_that_fell_back_in_loading_is_not_checked():
    broken = FaultyTier(memory(), {"read": repeat(fail(TierUnavailable("gone")))})
    sender, receiver = sharing(store=broken)
    fill(sender, IDS)
    assert receiver.prefill(IDS).outcome.reason is Reason.STORE_UNAVAILABLE
    receiver.flush()
    assert counts(receiver) == {}


def test_one_in_so_many_requests():
    sender, receiver = sharing(drift=DriftOptions(sample_rate=0.25))
    fill(sender, IDS)
    for _ in range(9):
        receiver.prefill(IDS)
        receiver.flush()
    assert counts(receiver) == {"samples": 3}


# What is left alone


def test_nothing_is_saved_and_no_tensor_is_changed():
    sender, receiver = sharing(save=True)
    store = receiver.connector.store
    fill(sender, IDS)
    prefix = receiver.prefill(IDS)
    before = [state.clone() for state in chain(*prefix.layers)]
    receiver.flush()
    assert counts(receiver) == {"samples": 1}
    assert all(map(torch.equal, chain(*prefix.layers), before))
    assert sources_in(store) == {sender.manifest.source_id}
    assert receiver.prefill(IDS).outcome.reason is Reason.CROSS_MODEL_HIT


def test_answers_are_the_same_with_and_without():
    sender, receiver = sharing()
    fill(sender, IDS)
    checked = [ask(receiver, IDS)[0] for _ in range(3)]
    receiver.flush()
    assert counts(receiver) == {"samples": 3}
    _, plain = sharing(store=receiver.connector.store, drift=None)
    expected = ask(plain, IDS)[0]
    assert all(torch.equal(sequences, expected) for sequences in checked)


def test_the_callers_token_ids_may_change():
    sender, receiver = sharing()
    fill(sender, IDS)
    ids = IDS.clone()
    kept = receiver.prefill(ids).layers
    receiver.prefill(ids)
    ids.fill_(5)
    receiver.flush()
    assert state(receiver).kl == pytest.approx(measured(receiver, kept)[1], rel=1e-3)


def test_without_drift_options_there_is_no_guard_and_no_thread():
    _, receiver = sharing(drift=None)
    assert receiver.connector.guard is None
    _, receiver = sharing()
    receiver.prefill(IDS)
    assert not [thread for thread in threading.enumerate() if thread.name == "droidspeak-shadow"]
    receiver.close()


# What goes wrong


def test_what_does_not_fit_is_dropped_and_counted(monkeypatch):
    receiver, gate = gated(monkeypatch)
    for _ in range(5):
        assert receiver.prefill(IDS).outcome.status is Status.APPLIED
    gate.set()
    receiver.flush()
    assert counts(receiver) == {"samples": 3, "dropped": 3}


def test_closing_lets_waiting_samples_go(monkeypatch):
    receiver, gate = gated(monkeypatch)
    receiver.prefill(IDS)
    closing = threading.Thread(target=receiver.close)
    closing.start()
    while "dropped" not in counts(receiver):
        time.sleep(0.001)
    assert closing.is_alive()
    gate.set()
    closing.join(60)
    receiver.close()
    receiver.prefill(IDS)
    receiver.flush()
    assert counts(receiver) == {"samples": 1, "dropped": 2}
    assert not [thread for thread in threading.enumerate() if thread.name == "droidspeak-shadow"]


def test_a_model_that_changed_meanwhile_is_not_compared(monkeypatch):
    model = copy.deepcopy(MINE)
    receiver, gate = gated(monkeypatch, mine=model)
    receiver.prefill(IDS)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    gate.set()
    receiver.flush()
    assert counts(receiver) == {"samples": 1, "failures": 1}
    assert receiver.connector.counters.get("drift_failures", "model_changed") == 1


def test_what_cannot_be_loaded_is_not_compared():
    store = memory()
    sender, receiver = sharing(store=FaultyTier(store, {"read": repeat(fail(TierUnavailable("gone")))}))
    fill(sender, IDS)
    turn(receiver)
    answered, outcome = ask(receiver, IDS)
    assert outcome.reason is Reason.DRIFT
    assert torch.equal(answered, plain_greedy(MINE, IDS[None]))
    receiver.flush()
    assert receiver.connector.counters.get("drift_failures", "not_loaded") == 1
    assert state(receiver).samples == 0


def test_the_worker_outlives_what_fails_in_it(monkeypatch, caplog):
    model = copy.deepcopy(MINE)
    receiver, gate = gated(monkeypatch, mine=model)
    receiver.prefill(IDS)
    model.train()
    with caplog.at_level(logging.ERROR):
        gate.set()
        receiver.flush()
    model.eval()
    assert receiver.connector.counters.get("drift_failures", "error") == 1
    assert "training mode" in caplog.text
    receiver.prefill(IDS)
    receiver.flush()
    assert counts(receiver) == {"samples": 2, "failures": 1}


# A real shift


def lab_prompts(encoder: PromptEncoder, *relations: str) -> list[tuple[list[int], list[int], str]]:
    """Prefix, question and answer of the base's prompts that ask about one of `relations`."""
    prompts = load_prompts(LAB / "prompts" / "base.jsonl")
    chosen = [prompt for prompt in prompts if prompt.question.split()[1] in relations]
    return [(*encoder.encode(prompt), prompt.answer) for prompt in chosen]


class Office:
    """Analyst and base on one store. The base reuses the analyst's whole cache, as the profile allows."""

    def __init__(self) -> None:
        self.store, policies = memory(), PolicySet()
        options = ConnectorOptions(chunk_size=64)
        self.sender, self.receiver = (
            DroidSpeak(
                load_model(LAB / "models" / name),
                self.store,
                policies,
                folder=LAB / "models" / name,
                options=options,
                save=name == "analyst",
                drift=DriftOptions(sample_rate=1, recovery_rate=1, least=6, window=12),
            )
            for name in ("analyst", "base")
        )
        OPEN.extend([self.sender, self.receiver])
        self.encoder = PromptEncoder(LAB / "models" / "base", 401)
        # As measured on the usual questions: full reuse keeps the answers (agreement 1.0, divergence 0.004).
        frontier = (FrontierPoint(Plan.parse("reuse", 12), 0.99),)
        ids = self.sender.manifest.source_id, self.receiver.manifest.source_id
        policies.add(Policy(*ids, frontier, thresholds=Thresholds(agreement=0.85, kl=0.3)))

    def ask(self, prefix: list[int], question: list[int], expected: str) -> tuple[Outcome, bool]:
        """The outcome, and whether the answer is right."""
        self.sender.prefill(prefix)
        self.sender.flush()
        ids = eos_ids(self.receiver.model)
        said = answer(self.receiver, [*prefix, *question], max_new_tokens=8, eos_ids=ids)
        self.receiver.flush()
        return said.outcome, self.encoder.units(said.token_ids) == expected.split()


@pytest.mark.slow
def test_a_pair_falls_back_when_the_questions_change_and_comes_back_with_them():
    office = Office()
    usual = lab_prompts(office.encoder, "employer-of", "city-of", "employer-and-city-of")
    unusual = lab_prompts(office.encoder, "interests-of")

    good = [office.ask(*prompt) for prompt in usual[:8]]
    assert all(outcome.status is Status.APPLIED and right for outcome, right in good)

    shifted = [office.ask(*prompt) for prompt in unusual]
    served = [right for outcome, right in shifted if outcome.status is Status.APPLIED]
    fallen = [right for outcome, right in shifted if outcome.reason is Reason.DRIFT]
    assert len(served) + len(fallen) == len(shifted)
    assert len(served) <= 12
    assert sum(served) < len(served) / 2
    assert fallen
    assert all(fallen)
    assert shifted[-1][0].status is Status.FALLBACK_REPREFILL
    assert shifted[-1][0].shared_tokens == 0

    back = [office.ask(*prompt) for prompt in usual[8:24]]
    assert all(right for _, right in back)
    reasons = [outcome.reason for outcome, _ in back]
    assert reasons[0] is Reason.DRIFT
    assert reasons[-1] is Reason.CROSS_MODEL_HIT
    assert reasons == sorted(reasons, key=[Reason.DRIFT, Reason.CROSS_MODEL_HIT].index)
    counters = office.receiver.connector.counters
    assert counters.get("drift_turns", "drifted") == counters.get("drift_turns", "recovered") == 1
    assert sources_in(office.store) == {office.sender.manifest.source_id}
