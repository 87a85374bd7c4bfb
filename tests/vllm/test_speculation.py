"""Receivers that speculate: the same answers, hits and saves as without, in fewer steps.

Draft models bring layers and a paged cache of their own, which are nobody's but theirs. vLLM's methods that
are missing here: `suffix` needs arctic-inference, `ngram_gpu` a GPU, the others drafts trained for a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from droidspeak.integrations.transformers import capture

from .engines import Answer, Engine, Request
from .models import (
    HIDDEN,
    VOCABULARY,
    assert_near,
    assert_same,
    keys_of,
    load,
    prompt,
    save_model,
    store_prefill,
    stored,
    write_plan,
)
from .stores import Disk

SIZE, NEW = 64, 60
HIT, EXACT, MISS = "cross_model_hit", "exact_hit", "miss"
SENT = [prompt(1, 230), (prompt(2, 50) * 6)[:300]]
OWN = [prompt(3, 230), (prompt(4, 30) * 10)[:257]]
NEITHER = [prompt(5, 230), (prompt(6, 25) * 12)[:280], prompt(7, 30)]


def save_draft(folder: Path, layers: int, heads: int) -> Path:
    """A small model that guesses badly."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_eagle(folder: Path) -> Path:
    """One layer over the target's last hidden states, as EAGLE has it; it guesses badly."""
    save_draft(folder, 1, 2)
    draft = load(folder).state_dict()
    kept = {name.removeprefix("model."): value for name, value in draft.items() if ".layers." in name}
    del kept["layers.0.input_layernorm.weight"]
    kept["fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(3)) * 0.05
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ngram(_folder: Path) -> dict[str, Any]:
    return {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def near_draft(folder: Path) -> dict[str, Any]:
    """As large as the receiver and near it: its layers have the same numbers, and it often guesses well."""
    return {"method": "draft_model", "model": str(save_model(folder, noise=0.32))}


def small_draft(folder: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(save_draft(folder, 2, 2))}


def other_draft(folder: Path) -> dict[str, Any]:
    """Its cache has pages of another size than the receiver's."""
    return {"method": "draft_model", "model": str(save_draft(folder, 2, 1))}


def eagle(folder: Path) -> dict[str, Any]:
    return {"method": "eagle", "model": str(save_eagle(folder))}


METHODS = [ngram, near_draft, small_draft, other_draft, eagle]


@dataclass(frozen=True)
class Round:
    """What an engine answered to `SENT`, `OWN` and `NEITHER`, and to all of them once more.

    Attributes:
        drafted, accepted: tokens.
    """

    answers: list[Answer]
    again: list[Answer]
    drafted: int
    accepted: int


def play(engine: Engine) -> Round:
    requests = [Request(ids, new=NEW) for ids in (*SENT, *OWN, *NEITHER)]
    answers = engine.tell(*requests)
    assert engine.forget()
    for at, request in enumerate(requests):
        request.at = at
    again = engine.ask(*requests)
    return Round(answers, again, *(engine.count(f"spec_decode_num_{what}_tokens") for what in KINDS))


KINDS = ("draft", "accepted")


@pytest.fixture(scope="module")
def policies(tmp_path_factory, manifests) -> str:
    return write_plan(tmp_path_factory.mktemp("policies"), *manifests, "1-2")


def fill(disk: Disk, folders, manifests) -> None:
    for ids in SENT:
        store_prefill(disk.tier, folders[0], manifests[0], ids, SIZE)
    for ids in OWN:
        store_prefill(disk.tier, folders[1], manifests[1], ids, SIZE)


@pytest.fixture(scope="module", params=["sync", "async"])
def plain(request, nursery, folders, manifests, policies, tmp_path_factory) -> tuple[str, Round]:
    """The mode of loading, and the round of an engine that does not speculate."""
    with Disk(tmp_path_factory.mktemp("plain") / "store") as disk:
        fill(disk, folders, manifests)
        options = {"chunk_size": SIZE, "policies": policies, "vllm": {"load": request.param}}
        with nursery.start(folders[1], tiers=[disk.url], **options) as engine:
            return request.param, play(engine)


@pytest.mark.parametrize("method", METHODS)
def test_a_receiver_that_speculates(nursery, folders, manifests, policies, tmp_path, plain, method):
    mode, right = plain
    options = {"chunk_size": SIZE, "policies": policies, "vllm": {"load": mode}}
    speculation = {**method(tmp_path / "draft"), "num_speculative_tokens": 3}
    with Disk(tmp_path / "store") as disk:
        fill(disk, folders, manifests)
        with nursery.start(
            folders[1], tiers=[disk.url], engine={"speculative_config": speculation}, **options
        ) as engine:
            mine = play(engine)
        assert mine.drafted > mine.accepted >= 0
        for answered, expected in zip(mine.answers + mine.again, right.answers + right.again, strict=True):
            assert answered.told == expected.told
            assert len(answered.tokens) == NEW
            assert_same(answered, expected)
        reasons = [answered.told["reason"] for answered in mine.answers]
        assert reasons == [HIT, HIT, EXACT, EXACT, MISS, MISS, "too_short"]
        # Prompts are saved as their model computes them, and nothing that was guessed.
        receiver = manifests[1]
        expected_keys = {key for ids in SENT for key in keys_of(manifests[0], ids, SIZE)}
        for ids in (*OWN, *NEITHER):
            keys = keys_of(receiver, ids, SIZE)
            expected_keys |= set(keys)
            if keys:
                assert_near(stored(disk.tier, keys), capture(load(folders[1]), torch.tensor(ids)))
        assert disk.keys() == expected_keys
