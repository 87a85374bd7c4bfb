"""Tensor parallelism: each rank saves its own shard and loads what it needs of any, and all fail together."""

from __future__ import annotations

import pytest
import torch

from droidspeak.integrations.transformers import PrefixKV, capture
from droidspeak.layerselect.mapfeatures import MapFeatures
from droidspeak.storage import SourceManifest

from .engines import Request
from .models import (
    NEAR,
    answer,
    assert_near,
    assert_said,
    door,
    keys_of,
    load,
    prompt,
    renamed,
    save_model,
    store_prefill,
    stored,
    write_maps,
    write_plan,
)
from .stores import Disk

SIZE, LENGTH, SHARDS = 64, 230, ("0of2", "1of2")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_two_ranks(start, folders, manifests, tmp_path, mode):
    sender, receiver = manifests
    model = load(folders[1])
    policies = write_plan(tmp_path / "policies", sender, receiver, "1-2")
    write_plan(tmp_path / "policies", receiver, sender, "1-2")  # for its sake the receiver saves E of layer 1
    mapper = renamed(sender, "mapped")
    maps = write_maps(tmp_path / "policies" / "maps.safetensors", MapFeatures.EMBEDDING, mapper, receiver)
    write_plan(tmp_path / "policies", mapper, receiver, "2-2+emap+kvmap:0-1", maps=maps)
    shared, one_broken, own = (prompt(number, LENGTH) for number in range(3))
    of_one_rank, mapped = prompt(4, LENGTH), prompt(5, LENGTH)
    longer = [*own, *prompt(3, 100)]
    with Disk(tmp_path / "store") as disk:
        for ids in (shared, one_broken):
            store_prefill(disk.tier, folders[0], sender, ids, SIZE, ranks=2)
        # Engines of another degree have saved these.
        store_prefill(disk.tier, folders[0], sender, of_one_rank, SIZE)
        store_prefill(disk.tier, folders[0], mapper, mapped, SIZE)
        store_prefill(disk.tier, folders[1], receiver, of_one_rank[:64], SIZE)
        disk.file(keys_of(sender, one_broken, SIZE, shard="1of2")[1]).write_bytes(b"nothing")
        with start(
            folders[1],
            e_layers=[1],
            tiers=[disk.url],
            chunk_size=SIZE,
            policies=policies,
            vllm={"load": mode},
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            engine={"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        ) as engine:
            mixed, broken, first = engine.tell(Request(shared), Request(one_broken), Request(own))
            for shard in SHARDS:
                disk.wait(keys_of(receiver, own, SIZE, shard=shard))
            assert engine.forget()
            (loaded,) = engine.ask(Request(own))
            # A chunk of one rank is lost: what the other one computed meanwhile must not be kept either.
            assert engine.forget()
            disk.file(keys_of(receiver, own, SIZE, shard="0of2")[0]).unlink()
            (recovered,) = engine.ask(Request(longer))
            for shard in SHARDS:
                disk.wait(keys_of(receiver, longer, SIZE, shard=shard))
            assert engine.forget()
            (again,) = engine.ask(Request(longer))
            others, by_maps = engine.tell(Request(of_one_rank), Request(mapped))
        assert mixed.status == ("applied", "cross_model_hit")
        assert broken.status == ("fallback_reprefill", "corrupt")
        assert recovered.status == ("fallback_reprefill", "evicted")
        assert loaded.status == again.status == ("applied", "exact_hit")
        assert [first.cached, loaded.cached, again.cached] == [0, 192, 320]
        assert_said(broken, answer(model, one_broken))
        for ids, answered in ((own, first), (own, loaded), (longer, recovered), (longer, again)):
            assert_said(answered, answer(model, ids))
        whole = capture(model, torch.tensor(longer), [1])
        for rank, shard in enumerate(SHARDS):
            part = [(k[:, [rank]], v[:, [rank]]) for k, v in whole.layers]
            mine = stored(disk.tier, keys_of(receiver, longer, SIZE, shard=shard), [1])
            assert_near(mine, PrefixKV(part, whole.inputs))
        assert others.status == by_maps.status == ("applied", "cross_model_hit")
        assert (others.told["exact_tokens"], others.told["shared_tokens"]) == (64, 128)
        # The other way round: what two ranks have saved serves one.
        with door(folders[1], disk.tier, SIZE, policies) as transformers:
            for ids, answered in ((shared, mixed), (of_one_rank, others), (mapped, by_maps)):
                assert_said(answered, answer(model, ids, transformers.prefill(ids)))
            theirs = transformers.prefill(longer)
        assert theirs.outcome.exact_tokens == 320
        for layer, (k, v) in enumerate(theirs.layers):
            for mine, right in zip((k, v), whole.layers[layer], strict=True):
                torch.testing.assert_close(mine, right[:320], rtol=0, atol=NEAR)


def test_two_ranks_with_windows(start, tmp_path):
    folder = save_model(tmp_path / "model", "mixed")
    me = SourceManifest.from_folder(folder)
    twin = renamed(me, "twin")  # the same weights: by any plan the answer is the receiver's own
    policies = write_plan(tmp_path / "policies", twin, me, "1-2")
    shared, one_broken = prompt(1, LENGTH), prompt(2, LENGTH)
    with Disk(tmp_path / "store") as disk:
        for ids in (shared, one_broken):
            store_prefill(disk.tier, folder, twin, ids, SIZE, ranks=2)
        disk.file(keys_of(twin, one_broken, SIZE, shard="1of2")[1]).write_bytes(b"nothing")
        with start(
            folder,
            tiers=[disk.url],
            chunk_size=SIZE,
            policies=policies,
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            engine={"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        ) as engine:
            mixed, broken = engine.tell(Request(shared), Request(one_broken))
    assert mixed.status == ("applied", "cross_model_hit")
    assert broken.status == ("fallback_reprefill", "corrupt")
    assert_said(mixed, answer(load(folder), shared))
    assert_said(broken, answer(load(folder), one_broken))
