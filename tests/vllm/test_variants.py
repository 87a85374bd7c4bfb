"""Other dtypes, adapters, and two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from droidspeak.integrations.transformers import capture
from droidspeak.storage import SourceManifest

from .engines import Request
from .models import (
    HIDDEN,
    LAYERS,
    answer,
    assert_near,
    assert_said,
    assert_same,
    keys_of,
    load,
    prompt,
    renamed,
    save_model,
    store_prefill,
    stored,
    write_plan,
)
from .stores import Disk

SIZE, LENGTH, HIT = 64, 230, "cross_model_hit"


# --- bfloat16 ---

COARSE = 0.1  # of a bfloat16 model's logarithms of probabilities, between engines


def test_bfloat16(start, tmp_path):
    folder = save_model(tmp_path / "model", dtype=torch.bfloat16)
    source = SourceManifest.from_folder(folder)
    assert source.architecture.dtype == "bfloat16"
    twin = renamed(source, "twin")
    policies = write_plan(tmp_path / "policies", twin, source, "1-2")
    mine, shared = prompt(1, LENGTH), prompt(2, LENGTH)
    with Disk(tmp_path / "store") as disk:
        store_prefill(disk.tier, folder, twin, shared, SIZE)
        options = {"tiers": [disk.url], "chunk_size": SIZE, "policies": policies}
        with start(folder, engine={"dtype": "bfloat16"}, **options) as engine:
            (first,) = engine.ask(Request(mine))
            disk.wait(keys_of(source, mine, SIZE))
            assert engine.forget()
            again, mixed, own = engine.tell(
                Request(mine), Request(shared), Request(shared, cache={"load": False})
            )
        right = capture(load(folder), torch.tensor(mine))
        assert_near(stored(disk.tier, keys_of(source, mine, SIZE)), right, COARSE)
    assert [answered.status[1] for answered in (first, again, mixed)] == ["miss", "exact_hit", HIT]
    assert_same(first, again, COARSE)
    # The sender's weights are the receiver's: mixing them changes nothing but rounding.
    assert_same(mixed, own, COARSE)


# --- LoRA ---


RANK, ALPHA = 8, 16


def save_adapter(folder: Path, seed: int) -> Path:
    """A PEFT adapter of the attention's projections, large enough to be heard."""
    folder.mkdir()
    targets = {"q_proj": HIDDEN, "v_proj": HIDDEN // 2}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [*targets]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, width in targets.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=draw) * 0.1
            tensors[f"{place}.lora_B.weight"] = torch.randn(width, RANK, generator=draw) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(folder: Path, adapter: Path, into: Path) -> Path:
    """The model of `folder` with the adapter in its weights."""
    model, tensors = load(folder), load_file(adapter / "adapter_model.safetensors")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            place = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            a = tensors[name.replace("lora_B", "lora_A")]
            weights[f"{place}.weight"] += ALPHA / RANK * b @ a
    model.save_pretrained(into, state_dict=weights)
    return into


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_adapters_are_models_of_their_own(start, folders, tmp_path, mode):
    one, other = (save_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    base = SourceManifest.from_folder(folders[1])
    tuned = SourceManifest.from_folder(folders[1], adapter=one)
    whole = merged(folders[1], one, tmp_path / "merged")
    ids, shared, plainly = prompt(10, LENGTH), prompt(11, LENGTH), prompt(12, LENGTH)
    twins = renamed(tuned, "twin"), renamed(base, "twin")
    policies = write_plan(tmp_path / "policies", twins[0], tuned, "1-2")
    write_plan(tmp_path / "policies", twins[1], base, "1-2")
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    with Disk(tmp_path / "store") as disk:
        store_prefill(disk.tier, whole, twins[0], shared, SIZE)
        store_prefill(disk.tier, folders[1], twins[1], plainly, SIZE)
        options = {"tiers": [disk.url], "chunk_size": SIZE, "policies": policies, "vllm": {"load": mode}}
        with start(folders[1], engine=lora, **options) as engine:
            plain, with_one = engine.tell(Request(ids), Request(ids, lora=str(one)))
            disk.wait(keys_of(base, ids, SIZE))
            disk.wait(keys_of(tuned, ids, SIZE))
            assert engine.forget()
            again = engine.tell(Request(ids), Request(ids, lora=str(one)), Request(ids, lora=str(other)))
            # Recomputed layers are the request's own, whoever else is in the batch. (Requests without an
            # adapter are asked alone: in one batch with adapters, vLLM on CPU gives them another one's.)
            mixed = engine.tell(Request(shared, lora=str(one)), Request(plainly))
            neighbour = Request(prompt(13, 40), lora=str(other), new=12)
            mixed += engine.ask(neighbour, Request(shared, lora=str(one), at=2))
    assert [answered.cached for answered in (plain, with_one, *again)] == [0, 0, 192, 192, 0]
    for answered in (plain, again[0]):
        assert_said(answered, answer(load(folders[1]), ids))
    for answered in (with_one, again[1]):
        assert_said(answered, answer(load(whole), ids))
    assert plain.tokens != with_one.tokens
    assert [answered.status[1] for answered in mixed] == [HIT, HIT, "too_short", HIT]
    assert_said(mixed[0], answer(load(whole), shared))
    assert_said(mixed[1], answer(load(folders[1]), plainly))
    assert_said(mixed[3], answer(load(whole), shared))
