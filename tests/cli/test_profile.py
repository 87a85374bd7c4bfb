"""`droidspeak profile` as a user runs it: real processes, real models in folders, real signals."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from droidspeak.errors import MissingExtra
from droidspeak.integrations.cli.profile import profile_pair
from droidspeak.integrations.transformers.profiling import PairJob
from droidspeak.layerselect.artifact import read_artifact, read_policy
from droidspeak.layerselect.mapping import Maps
from droidspeak.layerselect.profiler import ProfileOptions

from .commandline import call

LAB = Path(__file__).parents[2] / "lab"
LAYERS = 4


def save_model(folder, seed, **changes):
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    shape |= {"vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, **changes}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


def save_prompts(path, name, prefixes=4, questions=2, tokens=300, answer=(5,)):
    seeded = random.Random(name)
    rows = []
    for n in range(prefixes):
        prefix = [seeded.randrange(3, 64) for _ in range(tokens)]
        rows += [
            {"id": f"{name}-{n}-{q}", "prefix": prefix, "question": [q + 3], "answer": list(answer)}
            for q in range(questions)
        ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return {
        "sender": save_model(root / "sender", 1),
        "receiver": save_model(root / "receiver", 2),
        "calibration": save_prompts(root / "calibration.jsonl", "c"),
        "held_out": save_prompts(root / "held-out.jsonl", "h"),
    }


def command(pair, out, *options):
    sides = [part for name, path in pair.items() for part in (f"--{name.replace('_', '-')}", path)]
    # Random models have no right answers: divergence is all that can be measured.
    arguments = ["profile", *sides, "--out", out, "--metric", "kl", "--max-new-tokens", 3, *options]
    return [sys.executable, "-m", "droidspeak", *map(str, arguments)]


def run(*arguments):
    words = command(*arguments)
    if "--workers" in words or "--ray" in words:
        # Workers import the process that starts them anew.
        return subprocess.run(words, check=False, capture_output=True, text=True)
    return call(*words[3:])


def test_a_profile_becomes_a_policy_with_its_maps(pair, tmp_path):
    result = run(pair, tmp_path / "policy.json", "--format", "json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    policy = read_policy(tmp_path / "policy.json")
    assert [point["plan"] for point in summary["frontier"]] == [str(point.plan) for point in policy.frontier]
    assert policy.layers == LAYERS
    assert policy.costs is not None
    left = {"policy.json"}
    if policy.maps is not None:
        assert policy.maps.path == tmp_path / "policy.maps.safetensors"
        assert Maps.load(policy.maps).e
        left.add("policy.maps.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == left
    assert "Traceback" not in result.stderr


def test_a_table_is_for_people(pair, tmp_path):
    result = run(pair, tmp_path / "policy.json", "--no-maps", "--no-baselines")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sender -> receiver: 4 layers, kl on 8 held-out prompts")
    assert "full prefill" in result.stdout
    assert "policy written to" in result.stderr


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """What one process finds."""
    out = tmp_path_factory.mktemp("alone") / "policy.json"
    result = run(pair, out, "--no-baselines", "--threads", 1)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize(
    "options", [("--workers", 2), ("--workers", 2, "--ray", "local")], ids=["pool", "ray"]
)
def test_workers_find_what_one_process_finds(pair, alone, tmp_path, options):
    together = tmp_path / "policy.json"
    result = run(pair, together, "--no-baselines", "--threads", 1, *options)
    assert result.returncode == 0, result.stderr
    one, two = (read_artifact(path) for path in (alone, together))
    assert [point.plan for point in one.frontier] == [point.plan for point in two.frontier]
    assert [point.quality for point in one.frontier] == pytest.approx(
        [point.quality for point in two.frontier], abs=1e-5
    )
    assert one.profile.calibration == two.profile.calibration


def test_interrupted_it_goes_on_where_it_was(pair, tmp_path):
    out = tmp_path / "policy.json"
    work = tmp_path / ".policy.json.partial"
    slow = {**pair, "held_out": save_prompts(tmp_path / "many.jsonl", "many", prefixes=40, questions=4)}
    process = subprocess.Popen(
        command(slow, out, "--no-maps"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while lines(work / "results.jsonl") < 12 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "goes on" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    kept = lines(work / "results.jsonl")
    assert kept >= 12
    result = run(slow, out, "--no-maps")
    assert result.returncode == 0, result.stderr
    assert f"going on: {kept} results are there already" in result.stderr
    assert not work.exists()
    assert len(read_artifact(out).profile.held_out.ids) == 160


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def changed(pair, **changes):
    return {**pair, **changes}


def test_other_architectures_are_refused(pair, tmp_path):
    other = save_model(tmp_path / "deeper", 3, num_hidden_layers=5)
    refused(changed(pair, sender=other), tmp_path, "other_architecture")


def test_other_vocabularies_are_refused(pair, tmp_path):
    other = save_model(tmp_path / "wordier", 3, vocab_size=65)
    refused(changed(pair, sender=other), tmp_path, "other_architecture")


def test_a_model_is_not_its_own_sender(pair, tmp_path):
    refused(changed(pair, sender=pair["receiver"]), tmp_path, "same model")


def test_no_prompts_are_refused(pair, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(changed(pair, held_out=tmp_path / "empty.jsonl"), tmp_path, "holds no prompts")


def test_prompts_of_both_sets_are_refused(pair, tmp_path):
    refused(changed(pair, held_out=pair["calibration"]), tmp_path, "prompt c-0-0 is in both sets")


def test_prefixes_of_both_sets_are_refused(pair, tmp_path):
    rows = [json.loads(line) for line in pair["calibration"].read_text().splitlines()]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("\n".join(json.dumps({**row, "id": f"new-{row['id']}"}) for row in rows))
    refused(changed(pair, held_out=renamed), tmp_path, "has the prefix of calibration prompt")


def test_prompts_longer_than_the_context_are_refused(pair, tmp_path):
    long = save_prompts(tmp_path / "long.jsonl", "long", tokens=2050)
    refused(changed(pair, held_out=long), tmp_path, "prompt long-0-0 has 2051 tokens")


def test_weights_that_are_no_numbers_are_refused(pair, tmp_path):
    broken = save_model(tmp_path / "broken", 5)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for options in ((), ("--workers", 2)):
        refused(changed(pair, receiver=broken), tmp_path, "not finite", *options, "--no-maps")


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(pair, tmp_path):
    result = run(pair, tmp_path / "missing" / "policy.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert "cannot be written" in one_line(result)


def test_a_report_without_its_extra_is_refused_before_anything_is_measured(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    job = PairJob(**pair, options=ProfileOptions(metric="kl"))
    with pytest.raises(MissingExtra, match="the report"):
        profile_pair(job, tmp_path / "policy.json", report=tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--metric", "bleu"), "allowed are exact-match"), (("--granularity", 0), "granularity")],
)
def test_options_that_are_not_allowed(pair, tmp_path, options, said):
    refused(pair, tmp_path, said, *options)


def refused(pair, folder, said, *options):
    before = set(folder.iterdir())
    result = run(pair, folder / "policy.json", *options)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert said in one_line(result)
    assert set(folder.iterdir()) == before


def one_line(result):
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_the_lab_finds_the_layers_that_are_known(tmp_path):
    lab = {
        "sender": LAB / "models" / "inverse",
        "receiver": LAB / "models" / "base",
        "calibration": LAB / "prompts" / "base.calibration.jsonl",
        "held_out": LAB / "prompts" / "base.jsonl",
    }
    out = tmp_path / "policy.json"
    # The last metric given counts.
    result = run(
        lab, out, "--metric", "exact-match", "--max-new-tokens", 8, "--no-baselines", "--format", "json"
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["full_prefill"] == 1.0
    assert summary["full_reuse"] < 0.1
    good = [point for point in summary["frontier"] if point["quality"] >= 0.99]
    # Plain recompute needs layers 0-2; with maps fewer are enough.
    assert min(point["recomputed"] for point in good) < 3
    assert summary["maps"] is not None
