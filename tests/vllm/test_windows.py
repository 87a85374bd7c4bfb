"""Models whose layers have sliding windows: vLLM keeps several tables of blocks, and lets blocks go.

`twin` is a sender with the receiver's own weights under another name: whatever its plan recomputes, the
answer must be the receiver's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from droidspeak.layerselect import Requirement
from droidspeak.storage import SourceManifest

from .engines import Request
from .models import (
    LAYERS,
    answer,
    assert_near,
    assert_said,
    assert_same,
    door,
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

CHUNK, LENGTH, SHARED = 64, 400, 384
WHOLE = {"disable_hybrid_kv_cache_manager": True}


@dataclass
class Scene:
    """A receiver, its twin, and their store."""

    folder: Path
    me: SourceManifest
    twin: SourceManifest
    disk: Disk
    policies: str

    def settings(self, **engine):
        return {
            "tiers": [self.disk.url],
            "chunk_size": CHUNK,
            "policies": self.policies,
            "engine": engine,
        }

    def prefilled(self, source, number, length=LENGTH):
        """A prompt, stored as `source`'s."""
        ids = prompt(number, length)
        store_prefill(self.disk.tier, self.folder, source, ids[: len(ids) // CHUNK * CHUNK], CHUNK)
        return ids

    def right(self, ids):
        return answer(load(self.folder), ids)


@pytest.fixture(scope="module", params=["mixed", "windows"])
def scene(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    folder = save_model(root / "model", request.param)
    me = SourceManifest.from_folder(folder)
    twin = renamed(me, "twin")
    policies = write_plan(root / "policies", twin, me, "1-2")
    with Disk(root / "store") as disk:
        yield Scene(folder, me, twin, disk, policies)


@pytest.fixture(scope="module")
def engine(scene, nursery):
    with nursery.start(scene.folder, **scene.settings()) as engine:
        yield engine


def assert_shared(said, right, tokens=SHARED, exact=0):
    assert said.status == ("applied", "cross_model_hit")
    assert (said.told["exact_tokens"], said.told["shared_tokens"]) == (exact, tokens - exact)
    assert_said(said, right)


def test_rows_of_a_window_are_loaded_and_recomputed(scene, engine):
    ids = scene.prefilled(scene.twin, 1)
    shared, refused = engine.tell(Request(ids), Request(ids, cache={"share": False, "save": False}))
    assert_shared(shared, scene.right(ids))
    assert_said(refused, scene.right(ids))


@pytest.mark.parametrize("known", [64, 128, 320])
def test_own_chunks_before_the_shared_ones(scene, engine, known):
    ids = scene.prefilled(scene.twin, 10 + known)
    scene.prefilled(scene.me, 10 + known, known)
    (said,) = engine.ask(Request(ids))
    assert_shared(said, scene.right(ids), exact=known)


@pytest.mark.parametrize("known", [40, 100, 230, 370])
def test_what_vllms_own_prefix_cache_has_before_the_shared_chunks(scene, engine, known):
    ids = prompt(1000 + known, LENGTH)
    engine.ask(Request(ids[:known], cache={"share": False, "save": False}))
    scene.prefilled(scene.twin, 1000 + known)
    (said,) = engine.ask(Request(ids))
    assert_shared(said, scene.right(ids))
    assert said.cached == SHARED
    # Nothing of it has gone into the blocks that others use, too.
    (plain,) = engine.ask(Request(ids, cache={"share": False, "save": False}))
    assert_said(plain, scene.right(ids))


def test_requests_that_run_together(scene, engine):
    prompts = [scene.prefilled(scene.twin, 700 + n, 200 + 64 * n) for n in range(3)]
    prompts += [prompt(700 + n, 333) for n in range(3, 6)]
    requests = [Request(ids, at=2 * place) for place, ids in enumerate(prompts)]
    for ids, said in zip(prompts, engine.ask(*requests), strict=True):
        assert_said(said, scene.right(ids))


def test_a_lost_chunk_means_that_all_is_computed(scene, engine):
    ids = scene.prefilled(scene.twin, 800)
    lost = keys_of(scene.twin, ids, CHUNK)[3]
    data = bytearray(scene.disk.file(lost).read_bytes())
    data[-100] ^= 1
    scene.disk.file(lost).write_bytes(data)
    said, again = engine.tell(Request(ids), Request(ids))
    assert said.status == ("fallback_reprefill", "corrupt")
    for one in (said, again):
        assert_said(one, scene.right(ids))


def test_what_is_saved_is_what_transformers_would_have(scene, engine):
    ids = prompt(900, LENGTH)
    (first,) = engine.ask(Request(ids, new=40))
    assert first.status[1] == "miss"
    keys = keys_of(scene.me, ids, CHUNK)
    scene.disk.wait(keys)
    store_prefill(scene.disk.tier, scene.folder, renamed(scene.me, "right"), ids[:SHARED], CHUNK)
    right = stored(scene.disk.tier, keys_of(renamed(scene.me, "right"), ids, CHUNK), layers=LAYERS)
    assert_near(stored(scene.disk.tier, keys), right)
    engine.forget()
    (again,) = engine.ask(Request(ids))
    assert again.status[1] == "exact_hit"
    assert_said(again, scene.right(ids))


def test_a_plan_of_another_model(nursery, tmp_path):
    folders = [save_model(tmp_path / str(noise), "mixed", noise=noise) for noise in (0.0, 0.3)]
    sides = [SourceManifest.from_folder(folder) for folder in folders]
    policies = write_plan(tmp_path / "policies", *sides, "1-2")
    ids, half_known = prompt(1, LENGTH), prompt(2, LENGTH)
    plain = {"share": False, "save": False}
    with Disk(tmp_path / "store") as disk:
        with door(folders[0], disk.tier, CHUNK, policies, save=True) as sender:
            sender.prefill(ids)
            sender.prefill(half_known)
        with door(folders[1], disk.tier, CHUNK, policies) as receiver:
            mixed = answer(load(folders[1]), ids, receiver.prefill(ids, requirement=Requirement(1.0)))
        settings = {"tiers": [disk.url], "chunk_size": CHUNK, "policies": policies}
        for kept in ({}, WHOLE):
            with nursery.start(folders[1], engine=kept, **settings) as engine:
                shared, refused = engine.tell(Request(ids), Request(ids, cache=plain))
                engine.ask(Request(half_known[:230], cache=plain))
                # What vLLM has of it is shared by requests, and must stay the receiver's own.
                with_half, refused_with_half = engine.tell(
                    Request(half_known), Request(half_known, cache=plain)
                )
            assert_shared(shared, mixed)
            assert_said(refused, answer(load(folders[1]), ids))
            assert with_half.status[1] == "cross_model_hit"
            assert_said(refused_with_half, answer(load(folders[1]), half_known))


def test_hidden_states_beside_windows(nursery, tmp_path):
    folder = save_model(tmp_path / "model", "mixed_llama")
    me = SourceManifest.from_folder(folder)
    policies = write_plan(tmp_path / "policies", me, renamed(me, "receiver"), "1-2")
    ids = prompt(1, LENGTH)
    rows, answers = [], []
    for name, kept in (("several", {}), ("one", WHOLE)):
        with Disk(tmp_path / name) as disk:
            settings = {"tiers": [disk.url], "chunk_size": CHUNK, "policies": policies, "engine": kept}
            with nursery.start(folder, e_layers=[1], **settings) as engine:
                answers += engine.ask(Request(ids))
                disk.wait(keys_of(me, ids, CHUNK))
            rows.append(stored(disk.tier, keys_of(me, ids, CHUNK), [1]))
    assert_near(*rows)
    assert_same(*answers)
