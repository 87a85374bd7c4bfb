"""`droidspeak vllm-args` as a user runs it; vLLM is not needed for it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from droidspeak.config.opening import settings_from
from droidspeak.layerselect import FrontierPoint, MapFile, Plan, Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import SourceManifest

from .commandline import call

LAYERS = 4


def save_model(folder, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    names = ["coder", "base", "other"]
    return {name: save_model(root / name, seed) for seed, name in enumerate(names)}


@pytest.fixture(scope="module")
def policies(models, tmp_path_factory):
    """coder -> base, whose plans start from E of layers 2 and, mapped, 1; other -> base, which needs none."""
    folder = tmp_path_factory.mktemp("policies")
    write(folder / "one.json", models["coder"], models["base"], ["reuse", "2-3", "1-2+emap"])
    write(folder / "two.json", models["other"], models["base"], ["0-2"])
    return folder


def write(path, sender, receiver, plans):
    mine, theirs = (Side.of(folder.name, SourceManifest.from_folder(folder)) for folder in (sender, receiver))
    points = tuple(FrontierPoint(Plan.parse(plan, LAYERS), 1.0) for plan in plans)
    maps = MapFile(path.with_name("maps.safetensors"), "0" * 64)
    write_policy(path, Policy(mine.source_id, theirs.source_id, points, maps=maps), mine, theirs)


def run(*arguments, code=0):
    done = call("vllm-args", *arguments)
    assert done.returncode == code, done.stderr
    return done


def flags(*arguments):
    """By name, as a shell would hand them on."""
    words = shlex.split(run(*arguments).stdout)
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("role", "kv_role"), [("sender", "kv_producer"), ("receiver", "kv_consumer"), ("both", "kv_both")]
)
def test_roles(role, kv_role):
    given = flags("--role", role)
    assert set(given) == {"--kv-transfer-config", "--middleware"}
    assert json.loads(given["--kv-transfer-config"]) == {
        "kv_connector": "DroidSpeakConnector",
        "kv_connector_module_path": "droidspeak.integrations.vllm_connector",
        "kv_role": kv_role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {},
    }


@pytest.mark.parametrize(
    ("role", "model", "layers"),
    [
        ("sender", "coder", [1, 2]),
        ("both", "coder", [1, 2]),
        ("receiver", "coder", None),
        ("sender", "other", None),
        ("sender", "base", None),
    ],
)
def test_senders_capture_what_policies_need(models, policies, role, model, layers):
    given = flags("--role", role, "--model", models[model], "--policies", policies)
    assert given["--dtype"] == "float32"
    assert ("--speculative-config" in given) == (layers is not None)
    if layers is not None:
        assert json.loads(given["--speculative-config"]) == {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        }


def test_the_dtype_is_that_of_the_files(tmp_path):
    folder = save_model(tmp_path / "half", 5, torch.bfloat16)
    assert flags("--role", "receiver", "--model", folder)["--dtype"] == "bfloat16"


def test_options_reach_the_connector(policies, tmp_path):
    config = tmp_path / "it's one.yaml"
    config.write_text("quality_floor: 0.5\nchunk_size: 256\n")
    tiers = ["cpu://?capacity=1MiB", f"disk://{tmp_path}/a 'quoted' store?capacity=1GiB"]
    options = ["--policies", policies, "--config", config, "--chunk-size", 64, "--load", "async"]
    given = flags("--role", "both", *options, *(word for tier in tiers for word in ("--tier", tier)))
    extra = json.loads(given["--kv-transfer-config"])["kv_connector_extra_config"]
    settings = settings_from(extra)
    assert (settings.tiers, settings.chunk_size, settings.policies) == (tuple(tiers), 64, policies)
    assert (settings.quality_floor, settings.vllm.load) == (0.5, "async")


def test_policies_of_the_configuration_file(models, policies, tmp_path):
    config = tmp_path / "droidspeak.yaml"
    config.write_text(json.dumps({"policies": str(policies)}))
    given = flags("--role", "sender", "--model", models["coder"], "--config", config)
    assert "[1,2]" in given["--speculative-config"]


def test_paths_are_whole(policies, monkeypatch):
    monkeypatch.chdir(policies.parent)
    given = flags("--role", "receiver", "--policies", policies.name)
    extra = json.loads(given["--kv-transfer-config"])["kv_connector_extra_config"]
    assert extra == {"policies": str(policies)}


def test_json(models, policies):
    arguments = ["--role", "sender", "--model", models["coder"], "--policies", policies]
    content = json.loads(run(*arguments, "--format", "json").stdout)
    assert set(content) == {"version", "flags", "kv_transfer_config", "speculative_config", "dtype"}
    assert (content["version"], content["dtype"]) == (1, "float32")
    assert content["flags"] == [word for pair in flags(*arguments).items() for word in pair]
    assert json.loads(content["flags"][1]) == content["kv_transfer_config"]
    assert json.loads(content["flags"][3]) == content["speculative_config"]


@pytest.mark.parametrize(
    ("role", "model", "remark"),
    [
        ("sender", "base", "only K and V are saved"),
        ("receiver", "coder", "it loads its own only"),
        ("receiver", "base", ""),
        ("sender", "coder", ""),
        ("sender", None, "no --model"),
    ],
)
def test_remarks(models, policies, role, model, remark):
    folder = [] if model is None else ["--model", models[model]]
    told = run("--role", role, "--policies", policies, *folder).stderr
    assert remark in told
    assert told.count("\n") == bool(remark)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--role'"),
        (["--role", "boss"], "'sender', 'receiver', 'both'"),
        (["--role", "both", "--chunk-size", "100"], "powers of two"),
        (["--role", "both", "--chunk-size", "0"], "powers of two"),
        (["--role", "both", "--load", "later"], "'sync', 'async'"),
        (["--role", "both", "--policies", "nowhere"], "nowhere cannot be read"),
        (["--role", "both", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--role", "both", "--model", "nowhere"], "config.json cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    told = run(*arguments, code=2).stderr
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_vllm_is_not_imported():
    code = (
        "import sys, droidspeak.integrations.vllm_connector.arguments;"
        "print([name for name in ('vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
