"""A bad configuration: the engine answers rightly without a cache, or says in one line what is wrong."""

from __future__ import annotations

import json

import pytest

from .engines import Failed, Request
from .models import answer, assert_said, load, prompt, renamed, store_prefill, write_plan

MISS = ("fallback_reprefill", "miss")
LOST = ("fallback_reprefill", "store_unavailable")


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"chunk_sise": 64}, "unknown configuration key 'chunk_sise'; allowed: chunk_size, codec,"),
        ({"chunk_size": 100}, "chunk size 100"),
        ({"codec": "lzma"}, "lzma"),
        ({"vllm": {"load": "later"}}, "configuration key 'vllm.load': Input should be 'sync' or 'async'"),
        ({"tiers": ["dsk:///tmp/x"]}, "unknown tier 'dsk'"),
        ({"policies": "/nowhere/policies"}, "/nowhere/policies"),
        ({"config": "/nowhere/droidspeak.yaml"}, "configuration /nowhere/droidspeak.yaml: No such file"),
    ],
)
def test_mistakes_are_told_in_one_line(start, folders, extra, told):
    with pytest.raises(Failed) as failed:
        start(folders[0], **{"tiers": ["cpu://?capacity=1MiB"], **extra})
    kind, _, line = str(failed.value).partition(": ")
    assert kind in ("ConfigError", "PolicyError", "UsageError")
    assert told in line
    assert "\n" not in line


def untouchable(tmp_path, manifests):
    (tmp_path / "file").write_text("in the way")
    return {"tiers": [f"disk://{tmp_path}/file/store"]}, LOST


def nobody(tmp_path, manifests):
    return {"tiers": ["droidspeak://127.0.0.1:1"]}, LOST


def full(tmp_path, manifests):
    return {"tiers": [f"disk://{tmp_path}/store?capacity=64KiB"]}, MISS


def other_weights(tmp_path, manifests):
    """Policies, but none of them is about this model."""
    strangers = renamed(manifests[0], "somebody"), renamed(manifests[1], "somebody")
    policies = write_plan(tmp_path / "policies", *strangers, "1-2")
    return {"tiers": [f"disk://{tmp_path}/store?min_free=0"], "policies": policies}, MISS


def spoilt(tmp_path, manifests):
    policies = write_plan(tmp_path / "policies", *manifests, "1-2")
    (file,) = (tmp_path / "policies").iterdir()
    content = json.loads(file.read_text())
    content["frontier"][0]["quality"] = 0.99
    file.write_text(json.dumps(content))
    return {"tiers": [f"disk://{tmp_path}/store?min_free=0"], "policies": policies}, MISS


@pytest.mark.parametrize("misfortune", [untouchable, nobody, full, other_weights, spoilt])
def test_the_engine_answers_all_the_same(start, folders, manifests, tmp_path, misfortune):
    extra, expected = misfortune(tmp_path, manifests)
    prompts = [prompt(1, 230), prompt(2, 230)]
    with start(folders[1], chunk_size=64, **extra) as engine:
        answers = engine.tell(*map(Request, prompts))
    assert [answered.status for answered in answers] == [expected] * 2
    for ids, answered in zip(prompts, answers, strict=True):
        assert_said(answered, answer(load(folders[1]), ids))


def test_other_weights_are_never_used(start, folders, manifests, disk, tmp_path):
    """A sender that is stored, for a receiver whose weights have changed since its pair was profiled."""
    before = renamed(manifests[1], "before")
    policies = write_plan(tmp_path / "policies", manifests[0], before, "1-2")
    ids = prompt(3, 230)
    store_prefill(disk.tier, folders[0], manifests[0], ids, 64)
    with start(folders[1], tiers=[disk.url], chunk_size=64, policies=policies) as engine:
        (answered,) = engine.ask(Request(ids))
    assert (answered.status, answered.cached) == (MISS, 0)
    assert_said(answered, answer(load(folders[1]), ids))


def test_other_chunks_are_not_seen(start, folders, manifests, disk):
    """A store that others fill with chunks of another size."""
    ids = prompt(4, 230)
    store_prefill(disk.tier, folders[1], manifests[1], ids, 32)
    with start(folders[1], tiers=[disk.url], chunk_size=64) as engine:
        (answered,) = engine.ask(Request(ids))
    assert (answered.status, answered.cached) == (MISS, 0)


def test_without_the_plug_in_nothing_is_recomputed(start, folders, manifests, disk, tmp_path):
    """`VLLM_PLUGINS` can leave our entry point out: then the connector does not know the model's layers."""
    policies = write_plan(tmp_path / "policies", *manifests, "1-2")
    ids = prompt(5, 230)
    store_prefill(disk.tier, folders[0], manifests[0], ids, 64)
    options = {"tiers": [disk.url], "chunk_size": 64, "policies": policies}
    with start(folders[1], environment={"VLLM_PLUGINS": "none"}, **options) as engine:
        (answered,) = engine.ask(Request(ids))
    assert answered.status[0] == "fallback_reprefill"
    assert_said(answered, answer(load(folders[1]), ids))
    assert engine.said("is the vLLM plug-in loaded?")
