"""Another model's cache in the real engine, held against the transformers door's mixed prefill.

Loads within the step (`sync`) and between steps (`async`) do the same: every test runs with both.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from droidspeak.connector import Outcome, Reason
from droidspeak.integrations.transformers import Prefix, PrefixKV, capture, partial_prefill
from droidspeak.layerselect import Plan, Requirement
from droidspeak.storage import SourceManifest

from .engines import Engine, Request
from .models import (
    LAYERS,
    NEAR,
    answer,
    assert_said,
    assert_same,
    door,
    keys_of,
    load,
    prompt,
    renamed,
    store_prefill,
    write_plan,
)
from .stores import Disk

SIZE, LENGTH, WHOLE = 64, 230, 192
_GROUPS = itertools.combinations_with_replacement(range(LAYERS), 2)
PLANS = ["reuse", *(f"{start}-{end}" for start, end in _GROUPS if end - start < LAYERS - 1), "0-0,2-2"]
MISS, HIT = ("fallback_reprefill", "miss"), ("applied", "cross_model_hit")


@dataclass(frozen=True)
class World:
    """One receiver, and for each plan a sender of that name with a policy of that plan."""

    engine: Engine
    disk: Disk
    folders: tuple
    sender: SourceManifest
    receiver: SourceManifest
    policies: str

    def send(self, ids: list[int], plan: str, *, own: int = 0) -> None:
        """Stores a prompt as the sender of `plan`, and its first `own` chunks as the receiver itself."""
        store_prefill(self.disk.tier, self.folders[0], renamed(self.sender, plan), ids, SIZE)
        if own:
            store_prefill(self.disk.tier, self.folders[1], self.receiver, ids[: own * SIZE], SIZE)

    def mixed(self, ids: list[int], floor: float = 0.95):
        """What the transformers door on the same store makes of a prompt, and its outcome."""
        with door(self.folders[1], self.disk.tier, SIZE, self.policies) as transformers:
            prefix = transformers.prefill(ids, requirement=Requirement(floor))
            return answer(load(self.folders[1]), ids, prefix), prefix.outcome

    def own(self, ids: list[int]):
        return answer(load(self.folders[1]), ids)


@pytest.fixture(scope="module")
def policies(tmp_path_factory, manifests) -> str:
    sender, receiver = manifests
    folder = tmp_path_factory.mktemp("policies")
    for plan in PLANS:
        write_plan(folder, renamed(sender, plan), receiver, plan)
    write_plan(folder, renamed(sender, "all"), receiver, f"0-{LAYERS - 1}")
    write_plan(folder, renamed(sender, "poor"), receiver, "1-2", quality=0.9)
    return write_plan(folder, renamed(receiver, "twin"), receiver, "1-2")


@pytest.fixture(scope="module", params=["sync", "async"])
def world(request, start, folders, manifests, policies, tmp_path_factory):
    options = {"chunk_size": SIZE, "policies": policies, "vllm": {"load": request.param}}
    with Disk(tmp_path_factory.mktemp(request.param) / "store") as disk:
        engine = start(folders[1], tiers=[disk.url], **options)
        yield World(engine, disk, folders, *manifests, policies)
        engine.close()


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_equals_the_transformers_door(world, plan):
    ids = prompt(PLANS.index(plan), LENGTH)
    world.send(ids, plan)
    (answered,) = world.engine.ask(Request(ids))
    right, outcome = world.mixed(ids)
    assert answered.told == {
        "status": "applied",
        "reason": "cross_model_hit",
        "exact_tokens": 0,
        "shared_tokens": WHOLE,
        "plan": plan,
        "source": renamed(world.sender, plan).source_id,
    }
    assert (outcome.shared_tokens, str(outcome.plan)) == (WHOLE, plan)
    assert_said(answered, right)
    # And it is not the receiver's own, of which the same cannot be said.
    assert (right.logprobs[0] - world.own(ids).logprobs[0]).abs().max() > 10 * NEAR


def test_of_equal_weights_every_group_yields_the_own_prefill(world):
    ids = prompt(100, LENGTH)
    twin = renamed(world.receiver, "twin")
    store_prefill(world.disk.tier, world.folders[1], twin, ids, SIZE)
    (answered,) = world.engine.ask(Request(ids))
    assert answered.status == HIT
    assert_said(answered, world.own(ids))


def test_a_plan_that_recomputes_all_is_the_own_prefill(world):
    ids = prompt(101, LENGTH)
    world.send(ids, "all")
    (answered,) = world.engine.ask(Request(ids))
    assert (answered.status, answered.cached) == (("fallback_reprefill", "below_floor"), 0)
    assert_said(answered, world.own(ids))
    world.disk.wait(keys_of(world.receiver, ids, SIZE))


@pytest.mark.parametrize("plan", ["reuse", "0-1", "1-2", "0-0,2-2", "3-3"])
def test_own_chunks_first_then_anothers(world, plan):
    ids = prompt(110 + PLANS.index(plan), 400)
    world.send(ids, plan, own=2)
    (answered,) = world.engine.ask(Request(ids))
    right, outcome = world.mixed(ids)
    assert (answered.told["exact_tokens"], answered.told["shared_tokens"]) == (128, 256)
    assert (outcome.exact_tokens, outcome.shared_tokens) == (128, 256)
    assert_said(answered, right)


@pytest.mark.parametrize("plan", ["reuse", "0-1", "1-2", "2-3"])
@pytest.mark.parametrize("own", [0, 2])
def test_after_what_vllms_own_prefix_cache_holds(world, plan, own):
    ids = prompt(150 + 10 * own + PLANS.index(plan), LENGTH)
    world.engine.ask(Request(ids[:100], cache={"share": False, "save": False}))
    world.send(ids, plan, own=own)
    (answered,) = world.engine.ask(Request(ids))
    exact = max(96, own * SIZE)
    receiver, sender = (
        capture(load(folder), torch.tensor(ids), range(LAYERS)) for folder in world.folders[::-1]
    )
    mixed = PrefixKV(
        [
            tuple(torch.cat([mine[:exact], theirs[exact:WHOLE]]) for mine, theirs in zip(*pair, strict=True))
            for pair in zip(receiver.layers, sender.layers, strict=True)
        ],
        {layer: rows[exact:WHOLE] for layer, rows in sender.inputs.items()},
    )
    layers = partial_prefill(
        Plan.parse(plan, LAYERS), load(world.folders[1]), torch.tensor(ids[:WHOLE]), mixed, exact_tokens=exact
    )
    prefix = Prefix(load(world.folders[1]).config, tuple(layers), Outcome(Reason.CROSS_MODEL_HIT, LENGTH))
    assert answered.status == HIT
    assert_said(answered, answer(load(world.folders[1]), ids, prefix))


def test_exact_stays_exact(world):
    ids = prompt(200, LENGTH)
    world.send(ids, "1-2")
    right, _ = world.mixed(ids)
    shared, refused, again = world.engine.tell(
        Request(ids), Request(ids, cache={"share": False, "save": False}), Request(ids)
    )
    assert_said(shared, right)
    assert (refused.cached, refused.status) == (0, ("fallback_reprefill", "opted_out"))
    assert_said(refused, world.own(ids))
    # vLLM's own prefix cache now has the receiver's own blocks: they come before any others.
    assert again.cached >= WHOLE
    assert_said(again, world.own(ids))


def test_nothing_of_an_approximate_prefix_is_saved(world):
    ids, later = prompt(201, 400), prompt(202, SIZE)
    world.send(ids[:LENGTH], "1-2")
    (answered,) = world.engine.ask(Request(ids, new=70))
    assert (answered.status, answered.cached) == (HIT, WHOLE)
    world.engine.ask(Request(later))
    world.disk.wait(keys_of(world.receiver, later, SIZE))
    said = [*ids, *answered.tokens]
    assert not world.disk.keys() & set(keys_of(world.receiver, said, SIZE))


def test_what_a_request_may_ask_for(world):
    ids = prompt(210, LENGTH)
    world.send(ids, "poor")
    asked = [
        {},
        {"quality_floor": 0.8},
        {"quality_floor": 0.8, "share": False},
        {"load": False},
        {"lod": False},
        {"quality_floor": 2},
    ]
    answers = []
    for cache in asked:
        answers += world.engine.ask(Request(ids, cache={"save": False, **cache}))
        assert world.engine.forget()
    opted_out = ("fallback_reprefill", "opted_out")
    assert [answered.status for answered in answers] == [
        ("fallback_reprefill", "below_floor"),
        HIT,
        *[opted_out] * 4,
    ]
    assert [answered.cached for answered in answers] == [0, WHOLE, 0, 0, 0, 0]
    for answered in answers:
        assert_said(answered, world.mixed(ids, 0.8)[0] if answered.cached else world.own(ids))
    assert world.engine.said("kv_transfer_params droidspeak.lod: Extra inputs are not permitted")
    assert world.engine.said(
        "kv_transfer_params droidspeak.quality_floor: Input should be less than or equal"
    )
    assert not world.disk.keys() & set(keys_of(world.receiver, ids, SIZE))


def test_eight_together_are_as_one_by_one(world):
    prompts = [prompt(230 + n, LENGTH + 20 * n) for n in range(8)]
    plans = ["1-2", "reuse", "0-1", "3-3"]
    for ids, plan in zip(prompts, plans, strict=False):
        world.send(ids, plan)
    for ids in prompts[4:6]:
        store_prefill(world.disk.tier, world.folders[1], world.receiver, ids, SIZE)
    requests = [Request(ids, cache={"save": False}, new=12, at=at) for at, ids in enumerate(prompts)]
    for request in requests[6:]:
        request.at = 0  # decoding when the others come
        request.cache["load"] = request.prompt is prompts[7]
    together = world.engine.ask(*requests)
    assert world.engine.forget()
    for request, answered in zip(requests, together, strict=True):
        request.at = 0
        (alone,) = world.engine.ask(request)
        assert world.engine.forget()
        assert (alone.told, alone.cached) == (answered.told, answered.cached)
        assert_same(alone, answered)
    assert [answered.told["shared_tokens"] > 0 for answered in together] == [True] * 4 + [False] * 4
    assert [answered.told["exact_tokens"] > 0 for answered in together] == [False] * 4 + [True] * 2 + [
        False
    ] * 2
