"""Every recomputed group through vLLM has the logits that the transformers door has, to 1e-5 in float32.

What is left is rounding: kernels add up in another order. It is as large where no cache is used at all:
logits of up to 3 differ by 2e-6 between both engines' own prefills, by as much between each of them and a
float64 run, and by 4e-6 at most where a group is recomputed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from droidspeak.connector import Outcome, Reason
from droidspeak.integrations.transformers import Prefix, PrefixKV, capture, partial_prefill
from droidspeak.layerselect import Plan
from droidspeak.storage import SourceManifest

from .engines import Answer, Engine, Request
from .models import (
    LAYERS,
    VOCABULARY,
    load,
    logits_of,
    prompt,
    save_model,
    store_prefill,
    write_plan,
)
from .stores import Disk

SIZE, LENGTHS = 64, (100, 230, 1000)
NEAR, FAR = 1e-5, 0.1
GROUPS = [f"{start}-{end}" for start, end in itertools.combinations_with_replacement(range(LAYERS), 2)]


@dataclass(frozen=True)
class World:
    """A receiver on a store that has all prompts of another model.

    Attributes:
        sent: what that model computed, by the prompts' lengths.
    """

    engine: Engine
    model: torch.nn.Module
    sent: dict[int, PrefixKV]

    def ask(self, length: int, *, load: bool = True) -> Answer:
        request = Request(prompt(length, length), cache={"load": load, "save": False}, logprobs=VOCABULARY)
        (answered,) = self.engine.ask(request)
        assert self.engine.forget()
        return answered

    def apart(self, length: int, plan: str | None = None) -> float:
        """The largest difference of any logit between vLLM and transformers, by `plan` or without a cache."""
        ids = prompt(length, length)
        prefix = None
        if plan is not None:
            self.engine.insist(plan)
            prefix = self.mixed(ids, Plan.parse(plan, LAYERS))
        answered = self.ask(length, load=plan is not None)
        if prefix is not None:
            told = (answered.told["shared_tokens"], answered.told["plan"])
            assert told == (prefix.tokens, str(Plan.parse(plan, LAYERS)))
        right = logits(self.model, ids, prefix, answered.tokens)
        return float((logits_of(answered) - right).abs().max())

    def mixed(self, ids: list[int], plan: Plan) -> Prefix:
        """The prefix as the transformers door mixes it."""
        whole = (len(ids) - 1) // SIZE * SIZE
        layers = partial_prefill(plan, self.model, torch.tensor(ids[:whole]), self.sent[len(ids)])
        return Prefix(
            self.model.config, tuple(layers), Outcome(Reason.CROSS_MODEL_HIT, len(ids), 0, len(layers[0][0]))
        )


@torch.no_grad()
def logits(model, ids: list[int], prefix: Prefix | None, said: list[int]) -> torch.Tensor:
    """By transformers, at the places of `said`; `[places, vocabulary]`."""
    cache, start = (None, 0) if prefix is None else (prefix.past_key_values, prefix.tokens)
    rest = torch.tensor([[*ids[start:], *said[:-1]]])
    return model(rest, past_key_values=cache).logits[0, -len(said) :]


@pytest.fixture(
    scope="module", params=["llama sync", "llama async", "mistral sync", "qwen2 sync", "qwen3 sync"]
)
def world(request, nursery, tmp_path_factory):
    architecture, mode = request.param.split()
    root = tmp_path_factory.mktemp(architecture)
    folders = [save_model(root / str(noise), architecture, noise=noise) for noise in (0.0, 0.3)]
    sender, receiver = map(SourceManifest.from_folder, folders)
    options = {
        "chunk_size": SIZE,
        "policies": write_plan(root / "policies", sender, receiver, "reuse"),
        "vllm": {"load": mode},
        "engine": {"logprobs_mode": "raw_logits", "max_logprobs": -1},
    }
    sent = {}
    with Disk(root / "store") as disk:
        for length in LENGTHS:
            ids, whole = prompt(length, length), (length - 1) // SIZE * SIZE
            store_prefill(disk.tier, folders[0], sender, ids, SIZE)
            sent[length] = capture(load(folders[0]), torch.tensor(ids[:whole]), range(LAYERS))
        with nursery.start(folders[1], tiers=[disk.url], **options) as engine:
            yield World(engine, load(folders[1]), sent)


def test_without_a_cache_both_agree(world):
    """If this fails, it is not the cache."""
    assert max(world.apart(length) for length in LENGTHS) < NEAR


@pytest.mark.parametrize("plan", ["reuse", *GROUPS, "0-0,2-2", "1-1,3-3"])
def test_every_group_equals_the_transformers_door(world, plan):
    for length in LENGTHS:
        assert world.apart(length, plan) < NEAR


def test_groups_are_not_the_own_prefill(world):
    """The bound above would tell one group from another."""
    ids = prompt(230, 230)
    said = world.ask(230, load=False).tokens
    plans = [None, *(Plan.parse(plan, LAYERS) for plan in ("reuse", "0-1", "1-2", "3-3"))]
    rows = [logits(world.model, ids, plan and world.mixed(ids, plan), said)[0] for plan in plans]
    for one, other in itertools.combinations(rows, 2):
        assert (one - other).abs().max() > FAR
