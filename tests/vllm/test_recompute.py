"""Layers that vLLM recomputes, held against vLLM's own prefill in the same engine: not one bit differs.

A policy never says that all layers are recomputed, since the engine then prefills; here it is told to.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from droidspeak.storage import Chunk, Slot, SlotKind, SourceManifest

from .engines import Engine, Request
from .models import (
    LAYERS,
    VOCABULARY,
    keys_of,
    logits_of,
    prompt,
    renamed,
    save_model,
    store_prefill,
    write_plan,
)
from .stores import Disk

SIZE, ALL = 64, f"0-{LAYERS - 1}"
HIT = ("applied", "cross_model_hit")
LOGITS = {"logprobs_mode": "raw_logits", "max_logprobs": -1}
FAR = 0.1
GROUPS = [f"{start}-{end}" for start, end in itertools.combinations_with_replacement(range(LAYERS), 2)]


@dataclass(frozen=True)
class World:
    """A receiver on a store.

    Attributes:
        sender: whose caches a policy lets it use, by whatever plan it is told.
    """

    engine: Engine
    disk: Disk
    sender: SourceManifest

    def ask(self, ids: list[int], *, plan: str | None = None) -> torch.Tensor:
        """Logits of the answer by `plan`, or by the engine's own prefill; `[places, vocabulary]`."""
        if plan is not None:
            self.engine.insist(plan)
        cache = {"save": False, "load": plan is not None}
        (answered,) = self.engine.ask(Request(ids, cache=cache, logprobs=VOCABULARY))
        assert self.engine.forget()
        whole = 0 if plan is None else (len(ids) - 1) // SIZE * SIZE
        assert answered.cached == answered.told["shared_tokens"] == whole
        assert answered.status == (HIT if whole else ("fallback_reprefill", "opted_out"))
        return logits_of(answered)


# --- all layers, from the prompt's tokens ---

BUDGETS = {"in pieces": 128, "at once": 1024}
MODELS = {
    "llama": ("llama", torch.float32),
    "mistral": ("mistral", torch.float32),
    "qwen2": ("qwen2", torch.float32),
    "qwen3": ("qwen3", torch.float32),
    "bfloat16": ("llama", torch.bfloat16),
}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("model", MODELS)
def test_recomputing_all_is_the_own_prefill(start, tmp_path, model, budget, mode):
    architecture, dtype = MODELS[model]
    folders = [save_model(tmp_path / str(n), architecture, noise=n, dtype=dtype) for n in (0.0, 0.3)]
    sender, receiver = map(SourceManifest.from_folder, folders)
    policies = write_plan(tmp_path / "policies", sender, receiver, "reuse")
    prompts = [prompt(length, length) for length in (100, 230, 257, 1000)]
    settings = {**LOGITS, "max_num_batched_tokens": BUDGETS[budget], "dtype": str(dtype).partition(".")[2]}
    options = {"chunk_size": SIZE, "policies": policies, "vllm": {"load": mode}, "engine": settings}
    with Disk(tmp_path / "store") as disk:
        for ids in prompts:
            store_prefill(disk.tier, folders[0], sender, ids, SIZE)
        with start(folders[1], tiers=[disk.url], **options) as engine:
            world = World(engine, disk, sender)
            for ids in prompts:
                own = world.ask(ids)
                assert torch.equal(world.ask(ids, plan=ALL), own)
                # It is no wonder: without recomputing, it is another answer.
                assert (world.ask(ids, plan="reuse")[0] - own[0]).abs().max() > FAR


# --- every group, from the E of equal weights ---


@pytest.fixture(scope="module", params=["sync", "async"])
def twins(request, start, folders, manifests, tmp_path_factory):
    """A receiver whose sender has its own weights, under another name."""
    root, receiver = tmp_path_factory.mktemp(request.param), manifests[1]
    sender = renamed(receiver, "twin")
    policies = write_plan(root / "policies", sender, receiver, "reuse")
    # For the sake of these the receiver saves E of all layers, too.
    write_plan(root / "policies", receiver, renamed(receiver, "other"), "1-1,3-3", quality=0.9)
    write_plan(root / "policies", receiver, renamed(receiver, "another"), "2-2", quality=0.9)
    with Disk(root / "store") as disk:
        engine = start(
            folders[1],
            e_layers=range(1, LAYERS),
            tiers=[disk.url],
            chunk_size=SIZE,
            policies=policies,
            vllm={"load": request.param},
            engine=LOGITS,
        )
        yield World(engine, disk, sender)
        engine.close()


def hand_over(disk: Disk, ids: list[int], owner: SourceManifest, heir: SourceManifest) -> None:
    """What `owner` has of a prompt becomes `heir`'s, bit by bit."""
    keys = keys_of(owner, ids, SIZE)
    disk.wait(keys)
    slots = [*Slot.kv(range(LAYERS)), *(Slot(SlotKind.E, layer) for layer in range(1, LAYERS))]
    for key in keys:
        chunk = disk.tier.read(key, slots)
        assert chunk is not None
        tensors = {slot: chunk.tensor(slot) for slot in slots}
        disk.tier.write(Chunk.encode(replace(key, source=heir.source_id), tensors))
        disk.tier.delete(key)


@pytest.mark.parametrize("length", [230, 700])
def test_every_group_of_equal_weights_is_the_own_prefill(twins, manifests, length):
    ids = prompt(length, length)
    twins.engine.ask(Request(ids, new=1))
    assert twins.engine.forget()
    hand_over(twins.disk, ids, manifests[1], twins.sender)
    own = twins.ask(ids)
    for plan in ("reuse", *GROUPS, "0-0,2-2", "1-1,3-3"):
        assert torch.equal(twins.ask(ids, plan=plan), own), plan
