"""The lab as it is committed: models, prompts and findings belong together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from droidspeak.integrations.transformers import capture, partial_prefill, past_key_values
from droidspeak.layerselect import Plan
from droidspeak.prompts import load_prompts
from droidspeak.storage import SourceManifest, require_compatible

ROOT = Path(__file__).parents[2]
LAB = ROOT / "lab"
NAMES = sorted(path.name for path in (LAB / "models").iterdir())
PAIRS = json.loads((LAB / "pairs.json").read_text())


def load(name):
    return AutoModelForCausalLM.from_pretrained(LAB / "models" / name, dtype=torch.bfloat16).eval()


def test_there_is_a_base_and_four_variants_within_twenty_megabytes():
    assert "base" in NAMES
    assert len(NAMES) >= 5
    assert sum(path.stat().st_size for path in (LAB / "models").rglob("*") if path.is_file()) < 20e6


def test_all_pairs_may_share():
    manifests = [SourceManifest.from_folder(LAB / "models" / name) for name in NAMES]
    assert len({manifest.source_id for manifest in manifests}) == len(NAMES)
    for sender in manifests:
        for receiver in manifests:
            require_compatible(sender, receiver)


@pytest.mark.parametrize("name", NAMES)
def test_calibration_and_held_out_prompts_are_apart(name):
    held_out = load_prompts(LAB / "prompts" / f"{name}.jsonl")
    calibration = load_prompts(LAB / "prompts" / f"{name}.calibration.jsonl")
    assert len(held_out) >= 64
    assert not {prompt.id for prompt in held_out} & {prompt.id for prompt in calibration}
    assert not {prompt.prefix for prompt in held_out} & {prompt.prefix for prompt in calibration}


def test_the_words_are_all_known():
    tokenizer = AutoTokenizer.from_pretrained(LAB / "models" / "base")
    for name in NAMES:
        prompt = load_prompts(LAB / "prompts" / f"{name}.jsonl")[0]
        ids = tokenizer.encode(prompt.prefix + " " + prompt.question, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert len(ids) > 500


def test_a_hard_an_easy_and_a_pair_of_two_variants():
    kept = {(row["sender"], row["receiver"]): row["full_reuse"] / row["full_prefill"] for row in PAIRS}
    assert min(kept.values()) < 0.2
    assert max(kept.values()) > 0.9
    assert any("base" not in pair for pair in kept)


def answer(model, tokenizer, layers, prompt):
    """Greedy answer over a cache of the prefix."""
    cache = past_key_values(model.config, layers)
    step = torch.tensor([tokenizer.encode(prompt.question, add_special_tokens=False)])
    said = []
    with torch.no_grad():
        while len(said) < 8:
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            if int(step) == tokenizer.eos_token_id:
                break
            said.append(int(step))
    return tokenizer.decode(said)


def test_the_effect_of_the_paper_shows():
    """Coder -> base: reusing everything fails, recomputing the group that the lab chose repairs it."""
    row = next(row for row in PAIRS if (row["sender"], row["receiver"]) == ("coder", "base"))
    chosen = next(p for p in row["chosen"] if p["exact_match"] >= row["full_prefill"] - 0.01)
    assert chosen["end"] - chosen["start"] + 1 <= row["layers"] // 2
    sender, receiver = load("coder"), load("base")
    tokenizer = AutoTokenizer.from_pretrained(LAB / "models" / "base")
    prompts = load_prompts(LAB / "prompts" / "base.jsonl")[:8]
    ids = torch.tensor(tokenizer.encode(prompts[0].prefix, add_special_tokens=False))
    sent = capture(sender, ids, e_layers=range(row["layers"]))
    right = {}
    for text in ("reuse", f"{chosen['start']}-{chosen['end']}"):
        layers = partial_prefill(Plan.parse(text, row["layers"]), receiver, ids, sent)
        right[text] = sum(answer(receiver, tokenizer, layers, p) == p.answer for p in prompts)
    reused, repaired = right.values()
    assert reused <= 3
    assert repaired >= 7


def test_example_runs():
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_loop.py"], capture_output=True, text=True, check=True
    )
    assert "receiver: cross_model_hit" in result.stdout
    answer, _, right = result.stdout.splitlines()[-1].partition(" (right: ")
    assert answer.endswith("-> " + right.rstrip(")"))


def test_demo_on_the_lab(tmp_path):
    command = [sys.executable, "-m", "droidspeak", "demo", "--no-timing", "--limit=8", "--format=json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    full, reuse, *partial = json.loads(result.stdout)["pair"]["methods"]
    assert full["exact_match"] >= 0.9 > 0.5 > reuse["exact_match"]
    assert max(method["exact_match"] for method in partial) >= full["exact_match"] - 0.01
    assert all(method["statuses"] == {"applied": 8} for method in (reuse, *partial))
