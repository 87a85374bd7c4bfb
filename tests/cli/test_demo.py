"""The demo as a user runs it: a real command, two real processes, models in folders."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .commandline import call

METHOD_KEYS = {
    "method",
    "plan",
    "recomputed_layers",
    "answers",
    "exact_match",
    "f1",
    "token_agreement",
    "ttft_ms",
    "bytes_loaded",
    "statuses",
    "reasons",
}


def save_model(folder, seed, **changes):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, **{**shape, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_prompts(path, count=3, tokens=50, vocab=64):
    seeded = random.Random(0)
    prefix = [seeded.randrange(3, vocab) for _ in range(tokens)]
    rows = [{"id": str(n), "prefix": prefix, "question": [n + 3], "answer": [5]} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return {
        "sender": save_model(root / "sender", 1),
        "receiver": save_model(root / "receiver", 2),
        "prompts": save_prompts(root / "prompts.jsonl"),
    }


def run(*arguments, env=None):
    if env is None:
        return call(*arguments)
    command = [sys.executable, "-m", "droidspeak", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env)


def demo(pair, *arguments):
    options = [f"--{name}={value}" for name, value in pair.items()]
    return run("demo", *options, "--no-timing", *arguments)


def test_json_report_on_own_models(pair, tmp_path):
    store = tmp_path / "store"
    result = demo(pair, "--chunk-size=16", "--plan=1-2", "--format=json", f"--store={store}")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {"version", "droidspeak", "machine", "pair"}
    full, reuse, partial = report["pair"]["methods"]
    assert all(set(method) == METHOD_KEYS for method in (full, reuse, partial))
    assert (full["plan"], reuse["plan"], partial["plan"]) == (None, "reuse", "1-2")
    assert full["reasons"] == {"opted_out": 3}
    assert reuse["reasons"] == partial["reasons"] == {"cross_model_hit": 3}
    # Three chunks of K and V of the layers that are not recomputed, and E of layer 1.
    per_layer = 2 * 2 * 8 * 4
    assert reuse["bytes_loaded"] == 48 * 4 * per_layer
    assert partial["bytes_loaded"] == 48 * (2 * per_layer + 32 * 4)
    assert report["pair"]["sent"]["chunks"] == 3
    assert len(list(store.rglob("*.safetensors"))) == 3


def test_table_for_people(pair):
    result = demo(pair, "--chunk-size=16")
    assert result.returncode == 0, result.stderr
    assert "full prefill" in result.stdout
    assert "full reuse" in result.stdout
    assert "applied 3" in result.stdout
    assert "torch" in result.stderr


def test_pair_that_cannot_share_is_answered_and_says_why(pair, tmp_path):
    other = save_model(tmp_path / "other", 3, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    result = demo({**pair, "sender": other}, "--chunk-size=16", "--plan=0-1", "--format=json")
    assert result.returncode == 0, result.stderr
    methods = json.loads(result.stdout)["pair"]["methods"]
    assert [method["reasons"] for method in methods[1:]] == [{"other_rope": 3}] * 2
    assert [method["statuses"] for method in methods[1:]] == [{"unsupported": 3}] * 2
    assert all(method["token_agreement"] == 1 for method in methods)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--sender", "x"], "go together"),
        (["demo", "--limit", "0"], "--limit"),
        (["demo", "--formt", "json"], "--formt"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_calls_say_so_in_one_line(arguments, says):
    result = run(*arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sender": "/nowhere"}, "/nowhere/config.json cannot be read"),
        ({"prompts": "/nowhere.jsonl"}, "cannot be read"),
        ({"chunk-size": "100"}, "powers of two from 16"),
        ({"plan": "3-9"}, "layers 0-3"),
        ({"plan": "x"}, "START-END"),
        ({"receiver": "same"}, "the same model"),
    ],
)
def test_wrong_values_say_so_in_one_line(pair, change, says):
    if change.get("receiver") == "same":
        change = {"receiver": pair["sender"]}
    result = demo({**pair, "chunk-size": "16", **change})
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_texts_need_a_tokenizer(pair, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"id": "1", "prefix": "some words", "question": "why", "answer": "so"}))
    result = demo({**pair, "prompts": path})
    assert result.returncode == 2
    assert "has no tokenizer" in result.stderr


def test_version_and_help():
    assert run("--version").stdout.strip() == "0.1.0"
    result = run("demo", "--help")
    assert result.returncode == 0
    assert "--chunk-size" in result.stdout
