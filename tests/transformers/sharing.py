"""Doors over tiny models, and what a plain model answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from droidspeak.connector import ConnectorOptions, Outcome
from droidspeak.integrations.transformers import DroidSpeak, Prefix
from droidspeak.layerselect import Group, Plan, Policy, PolicySet
from droidspeak.storage import Tier
from droidspeak.storage.memory import MemoryTier

SIZE = 16
NEW = 10


def memory() -> MemoryTier:
    return MemoryTier(1 << 26)


def door(model, store: Tier, policies: PolicySet | None = None, **options) -> DroidSpeak:
    """A door with small chunks; those of `own` go to the door itself."""
    own = {name: options.pop(name) for name in ("drift", "folder", "save", "requirement") if name in options}
    return DroidSpeak(model, store, policies, options=ConnectorOptions(chunk_size=SIZE, **options), **own)


def pretended_folder(place: Path, name: str) -> Path:
    """A folder that gives weights the identity `name`; nobody loads a model from it."""
    folder = place / name
    folder.mkdir()
    (folder / "model.safetensors").write_text(name)
    return folder


def policy(sender: DroidSpeak, receiver: DroidSpeak, plan: Plan | str) -> Policy:
    plan = Plan.parse(plan, receiver.decoder.num_layers) if isinstance(plan, str) else plan
    return Policy.fixed(sender.manifest.source_id, receiver.manifest.source_id, plan)


def partial_plans(num_layers: int) -> list[Plan]:
    """Full reuse, and every group that leaves something to reuse."""
    groups = itertools.combinations_with_replacement(range(num_layers), 2)
    plans = [Plan.recompute(num_layers, [Group(*ends)]) for ends in groups]
    return [Plan.parse("reuse", num_layers), *(plan for plan in plans if plan.loaded)]


def fill(sender: DroidSpeak, *prompts: Tensor) -> None:
    """Stores what `sender` prefills of each prompt."""
    for prompt in prompts:
        sender.prefill(prompt)
    sender.flush()


@torch.no_grad()
def logits_after(model, prefix: Prefix, token_ids: Tensor) -> Tensor:
    """Logits of all tokens that the prefix leaves."""
    return model(token_ids[None, prefix.tokens :], past_key_values=prefix.past_key_values).logits[0]


@torch.no_grad()
def own_logits(model, token_ids: Tensor, split: int) -> Tensor:
    """Logits of the tokens from `split` on, by the model's own prefill in two steps."""
    cache = model(token_ids[None, :split], use_cache=True).past_key_values
    return model(token_ids[None, split:], past_key_values=cache).logits[0]


def left_padded(prompts: Sequence[Tensor], width: int | None = None) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`."""
    width = width or max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return input_ids, mask


@torch.no_grad()
def greedy(model, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What the plain model generates, prompts and all."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)


def ask(droid: DroidSpeak, prompt: Tensor, **options) -> tuple[Tensor, Outcome]:
    """Greedy answer to one prompt through the door, and its outcome."""
    answer = droid.generate(prompt[None], max_new_tokens=NEW, do_sample=False, **options)
    (outcome,) = answer.outcomes
    return answer.sequences, outcome


def sources_in(store: Tier) -> set[str]:
    """Whose chunks a store holds."""
    held = store.keys()
    return {key.source for key in held}
