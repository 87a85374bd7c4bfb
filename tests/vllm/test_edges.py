"""What is easily forgotten: prompts that end where chunks end, strangers in the store, stores that hang."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.storage import SourceManifest
from droidspeak.storage.memory import MemoryTier

from .engines import Request
from .models import (
    LAYERS,
    VOCABULARY,
    answer,
    assert_said,
    door,
    keys_of,
    load,
    prompt,
    store_prefill,
    write_plan,
)
from .processes import Daemon
from .stores import Disk, Wire

SIZE, LENGTH = 64, 230
MISS, HIT = ("fallback_reprefill", "miss"), ("applied", "cross_model_hit")


# --- prompts that end with a chunk, with a block, or just beyond ---


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("plan", ["reuse", "1-2", "0-1"])
def test_the_last_token_is_left_to_the_receiver(start, folders, manifests, tmp_path, plan, block, mode):
    policies = write_plan(tmp_path / "policies", *manifests, plan)
    lengths = {64: 0, 65: 64, 127: 64, 128: 64, 129: 128, 192: 128, 256: 192, 257: 256}
    options = {"chunk_size": SIZE, "policies": policies, "vllm": {"load": mode}}
    with Disk(tmp_path / "store") as disk, door(folders[1], disk.tier, SIZE, policies) as transformers:
        for length in lengths:
            store_prefill(disk.tier, folders[0], manifests[0], prompt(length, length), SIZE)
        with start(folders[1], tiers=[disk.url], engine={"block_size": block}, **options) as engine:
            for length, shared in lengths.items():
                ids = prompt(length, length)
                (answered,) = engine.ask(Request(ids, cache={"save": False}))
                assert answered.told["shared_tokens"] == answered.cached == shared
                assert answered.status == (HIT if shared else ("fallback_reprefill", "too_short"))
                assert_said(answered, answer(load(folders[1]), ids, transformers.prefill(ids)))


# --- strangers ---


def with_tokenizer(folder, copy):
    """The same model with a tokenizer, which it had none of."""
    shutil.copytree(folder, copy)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(copy)
    return copy


@pytest.mark.parametrize("changed", ["sender", "receiver"])
def test_another_tokenizer(start, folders, manifests, disk, tmp_path, changed):
    """A model is another one with another tokenizer: what was profiled before is not about it."""
    policies = write_plan(tmp_path / "policies", *manifests, "1-2")
    folder = with_tokenizer(folders[changed == "receiver"], tmp_path / "model")
    strange = SourceManifest.from_folder(folder)
    assert strange.weights == manifests[changed == "receiver"].weights
    sender = strange if changed == "sender" else manifests[0]
    ids = prompt(len(changed), LENGTH)
    store_prefill(disk.tier, folders[0], sender, ids, SIZE)
    if changed == "receiver":  # what it stored before is not its own any more
        store_prefill(disk.tier, folders[1], manifests[1], ids, SIZE)
    model = folder if changed == "receiver" else folders[1]
    with start(model, tiers=[disk.url], chunk_size=SIZE, policies=policies) as engine:
        (answered,) = engine.ask(Request(ids))
        assert (answered.status, answered.cached) == (MISS, 0)
        assert_said(answered, answer(load(folders[1]), ids))
        disk.wait(keys_of(strange if changed == "receiver" else manifests[1], ids, SIZE))


@pytest.mark.parametrize("policy", ["none", "the other way round"])
def test_a_pair_without_a_policy(start, folders, manifests, disk, tmp_path, policy):
    options = {}
    if policy != "none":
        options["policies"] = write_plan(tmp_path / "policies", *manifests[::-1], "1-2")
    ids = prompt(10 + len(policy), LENGTH)
    store_prefill(disk.tier, folders[0], manifests[0], ids, SIZE)
    with start(folders[1], role="kv_consumer", tiers=[disk.url], chunk_size=SIZE, **options) as engine:
        (answered,) = engine.ask(Request(ids))
    assert (answered.status, answered.cached) == (MISS, 0)
    assert_said(answered, answer(load(folders[1]), ids))


def test_shapes_that_no_policy_should_join(start, folders, manifests, disk, tmp_path):
    """A policy says so all the same, and the store has chunks of that name: they are of another shape."""
    wider = replace(manifests[0].architecture, kv_heads=4)
    stranger = replace(manifests[0], architecture=wider)
    policies = write_plan(tmp_path / "policies", stranger, manifests[1], "1-2")
    ids = prompt(20, LENGTH)
    connector = Connector(disk.tier, None, ConnectorOptions(chunk_size=SIZE))
    session = connector.save(ids, stranger, e_layers=())
    for layer in range(LAYERS):
        rows = torch.zeros(len(ids), 4, wider.head_dim)
        session.put(layer, rows, rows)
    assert session.finish(wait=True) == LENGTH // SIZE
    connector.close()
    with start(
        folders[1], role="kv_consumer", tiers=[disk.url], chunk_size=SIZE, policies=policies
    ) as engine:
        (answered,) = engine.ask(Request(ids))
    assert answered.status[0] != "applied"
    assert_said(answered, answer(load(folders[1]), ids))


# --- stores that hang ---


def test_a_store_that_hangs_does_not_hold_up_who_saves(start, folders, manifests, tmp_path):
    """Prompts are answered while chunks wait; no deadline lets them go before the test's end."""
    daemon = Daemon(tmp_path / "store")
    try:
        with (
            Disk(tmp_path / "store") as disk,
            Wire(daemon.port) as wire,
            start(
                folders[0],
                role="kv_producer",
                tiers=[f"droidspeak://127.0.0.1:{wire.port}"],
                chunk_size=SIZE,
                limits={"remote": {"read_deadline": 3600.0, "write_deadline": 3600.0}},
            ) as engine,
        ):
            engine.ask(Request(prompt(30, LENGTH)))
            disk.wait(keys_of(manifests[0], prompt(30, LENGTH), SIZE))
            wire.stalls, wire.budget = True, 0
            prompts = [prompt(number, LENGTH) for number in range(31, 36)]
            for ids in prompts:
                (answered,) = engine.ask(Request(ids))
                assert_said(answered, answer(load(folders[0]), ids))
            stored = {key for ids in prompts for key in keys_of(manifests[0], ids, SIZE)}
            assert len(stored - disk.keys()) >= len(stored) - 1  # one write may have gone out
            wire.mend()
    finally:
        daemon.kill()


class Locked(MemoryTier):
    """Takes nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__(1 << 28)
        self.opened = threading.Event()

    def write(self, chunk):
        assert self.opened.wait(60)
        return super().write(chunk)


@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
def test_what_does_not_fit_into_the_backlog_is_counted(manifests):
    from droidspeak.integrations.vllm_connector.messages import SaveOrder
    from droidspeak.integrations.vllm_connector.saving import Saver
    from droidspeak.integrations.vllm_connector.tables import BlockTable

    block, blocks = 32, 7
    pages = torch.randn(blocks, block, 2, 32)
    layer = SimpleNamespace(
        device=pages.device,
        snapshot=lambda ids: pages[ids].clone(),
        rows=lambda copied: (copied.flatten(0, 1),) * 2,
        table=BlockTable(0, block),
    )
    store = Locked()
    connector = Connector(store, None, ConnectorOptions(chunk_size=SIZE, save_backlog=1))
    one_chunk = LAYERS * 2 * block * 2 * 32 * 4
    saver = Saver(connector, dict.fromkeys(range(LAYERS), layer), None, backlog=2 * one_chunk)
    prompts = [prompt(number, SIZE) for number in range(40, 46)]
    for ids in prompts:
        saver.keep(SaveOrder("it", manifests[0], "", tuple(ids), range(1), ((1, 2),)))
    store.opened.set()
    saver.close()
    connector.close()
    saved, dropped = (connector.counters.get(name) for name in ("chunks_saved", "chunks_dropped"))
    assert saved + dropped == len(prompts)
    assert dropped > 0
    assert len(list(store.keys())) == saved
