"""`droidspeak policy` as a user runs it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from droidspeak.layerselect import Costs, FrontierPoint, Measures, Plan, Policy, Score
from droidspeak.layerselect.artifact import Side, read_policy, write_policy
from droidspeak.storage import SourceManifest

from .commandline import call

LAYERS = 4
POINTS = [("reuse", 0.4), ("1-2", 0.96), ("0-2", 0.98), ("full", 1.0)]


def save_model(folder, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_model(root / name, seed) for seed, name in enumerate(["coder", "base", "other"])]


@pytest.fixture
def file(models, tmp_path):
    """coder -> base: 1 ms to recompute a layer of 1,000 tokens."""
    sender, receiver = (Side.of(folder.name, SourceManifest.from_folder(folder)) for folder in models[:2])
    measures = Measures.of({"p-[/b]": Score(1.0, 0.01, 1.0)})
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), share, measures) for text, share in POINTS)
    policy = Policy(sender.source_id, receiver.source_id, frontier, costs=Costs(1e-6))
    path = tmp_path / "coder-base.json"
    write_policy(path, policy, sender, receiver)
    return path


def run(*arguments):
    return call("policy", *arguments)


def rows(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line.split()}


def refused(result, says):
    assert result.returncode == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_show(file):
    result = run("show", file)
    assert result.returncode == 0, result.stderr
    assert "coder -> base" in result.stdout
    assert read_policy(file).sender in result.stdout
    assert rows(result.stdout)["1-2"][1:3] == ["2", "0.960"]
    # A name with brackets is no markup.
    assert "p-[/b]" in result.stdout


def test_show_json_is_the_file(file):
    shown = json.loads(run("show", file, "--format=json").stdout)
    content = json.loads(file.read_text())
    assert shown.pop("created")[:19] == content.pop("created")[:19]
    assert shown == content


def test_list(file):
    later = file.with_name("later.json")
    later.write_bytes(file.read_bytes())
    broken = file.with_name("broken.json")
    broken.write_text(file.read_text().replace("0.96", "0.99"))
    result = run("list", file.parent)
    assert result.returncode == 0, result.stderr
    table = rows(result.stdout)
    assert table["broken.json"][-1] == "refused"
    assert "coder -> base" in " ".join(table["later.json"])
    assert "was changed after it was made" in result.stderr
    listed = json.loads(run("list", file.parent, "--format=json").stdout)
    assert [row["file"] for row in listed["refused"]] == ["broken.json"]
    row = next(row for row in listed["policies"] if row["file"] == "later.json")
    assert (row["pair"], row["plans"], row["plan"], row["state"]) == ("coder -> base", 4, "1-2", "in use")


def choice(file, *options):
    result = run("choose", file, "--tokens=1000", "--format=json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# K and V of a layer take 128 bytes a token, E as many: 128 kB for 1,000 tokens.
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ((), "1-2"),
        (("--bandwidth=1GB/s",), "1-2"),
        (("--bandwidth=40MB/s",), "full"),
        (("--bandwidth=40MB/s", "--queue=1"), "1-2"),
        (("--slo-ms=3.5",), "0-2"),
        (("--floor=0.97",), "0-2"),
        (("--floor=1.5",), None),
    ],
)
def test_choose(file, options, chosen):
    assert choice(file, *options)["chosen"] == chosen


def test_choose_predicts_for_each_plan(file):
    points = {point["plan"]: point for point in choice(file, "--bandwidth=128MB/s")["points"]}
    times = {plan: round(point["ttft_ms"], 6) for plan, point in points.items()}
    assert times == {"reuse": 4.0, "1-2": 3.0, "0-2": 3.0, "full": 4.0}
    assert [points[plan]["allowed"] for plan in ("reuse", "1-2")] == [False, True]
    unknown = {point["plan"]: point["ttft_ms"] for point in choice(file)["points"]}
    assert unknown == {"reuse": None, "1-2": None, "0-2": None, "full": pytest.approx(4.0)}


def test_choose_for_people(file, models):
    result = run("choose", file, "--tokens=1000", f"--sender={models[0]}", f"--receiver={models[1]}")
    assert result.returncode == 0, result.stderr
    assert "coder -> base: plan 1-2" in result.stdout
    assert rows(result.stdout)["1-2"][-1] == "chosen"
    result = run("choose", file, "--tokens=1000", "--floor=2")
    assert "no plan reaches the floor" in result.stdout
    assert "prefills in full" in result.stderr


def test_choose_refuses_another_pair(file, models):
    refused(
        run("choose", file, "--tokens=9", f"--sender={models[2]}"), "another sender, coder: other differs"
    )
    refused(run("choose", file, "--tokens=9", f"--receiver={models[2]}"), "another receiver, base")


def test_diff(file):
    same = run("diff", file, file, "--exit-code")
    assert (same.returncode, same.stdout) == (0, "")
    other = file.with_name("other.json")
    content = json.loads(file.read_text())
    sides = [Side(content[role]["name"], content[role]["manifest"]) for role in ("sender", "receiver")]
    policy = read_policy(file)
    frontier = (replace(policy.frontier[0], quality=0.5), *policy.frontier[1:3])
    write_policy(other, replace(policy, frontier=frontier), *sides)
    result = run("diff", file, other)
    assert result.returncode == 0, result.stderr
    assert rows(result.stdout)["plan.reuse.quality"][1:] == ["0.4", "0.5"]
    assert rows(result.stdout)["plan.full.quality"][1:] == ["1", "-"]
    assert "plan.1-2.quality" not in result.stdout
    assert run("diff", file, other, "--exit-code").returncode == 1
    changes = json.loads(run("diff", file, other, "--format=json").stdout)
    assert changes["same"] is False
    assert {"field": "plan.reuse.quality", "one": 0.4, "other": 0.5} in changes["changes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["list", "/nowhere"], "/nowhere cannot be read"),
        (["choose", "FILE"], "--tokens"),
        (["choose", "FILE", "--tokens=0"], "--tokens"),
        (["choose", "FILE", "--tokens=9", "--bandwidth=fast"], "--bandwidth 'fast'"),
        (["choose", "FILE", "--tokens=9", "--bandwidth=0"], "positive"),
        (["choose", "FILE", "--tokens=9", "--slo-ms=-1"], "positive"),
        (["choose", "FILE", "--tokens=9", "--floor=nan"], "finite"),
        (["choose", "FILE", "--tokens=9", "--sender=/nowhere"], "/nowhere/config.json cannot be read"),
        (["diff", "FILE", "/nowhere.json"], "/nowhere.json cannot be read"),
    ],
)
def test_wrong_calls_say_so_in_one_line(file, arguments, says):
    refused(run(*[file if argument == "FILE" else argument for argument in arguments]), says)
