"""Policy files: what is written is read, and what is not what was written is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak import __version__
from droidspeak.errors import PolicyError
from droidspeak.layerselect import Costs, FrontierPoint, MapFile, Measures, Plan, Policy, Score, Thresholds
from droidspeak.layerselect.artifact import (
    FORMAT,
    Side,
    read_artifact,
    read_pair,
    read_policy,
    schema,
    write_policy,
    write_profile_policy,
)
from droidspeak.layerselect.profile import Finding, Profile, PromptSet, Work
from droidspeak.storage import Architecture, SourceManifest

from .policyfiles import digest, remake

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "policy-1.json"
LAYERS = 6
_ARCHITECTURE = Architecture("llama", LAYERS, 2, 8, 32, 64, "rope", "full", "float32")
MANIFESTS = {
    name: SourceManifest(weights=name, architecture=_ARCHITECTURE, tokenizer="ids:64")
    for name in ("coder", "base", "other")
}
CODER, BASE, OTHER = (Side.of(name, manifest) for name, manifest in MANIFESTS.items())
MEASURES = Measures.of({"p-1": Score(1.0, 0.01, 1.0), "p-2": Score(0.5, 0.3, 0.75)})


def measured_policy(folder: Path, **changes) -> Policy:
    points = [("reuse", 0.4), ("1-2", 0.9), ("1-2+emap+kvmap:0", 0.97), ("0-3", 1.01)]
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), share, MEASURES) for text, share in points)
    policy = Policy(
        CODER.source_id,
        BASE.source_id,
        frontier,
        thresholds=Thresholds(0.7, 0.4),
        costs=Costs(1e-6, 1e-10, 1e-7, 0.01),
        maps=MapFile(folder / "coder-base.maps.safetensors", "d" * 64),
    )
    return replace(policy, **changes)


def profile_of(policy: Policy, **changes) -> Profile:
    full = Finding(Plan.parse("full", LAYERS), MEASURES, 1.0)
    profile = Profile(
        "coder",
        "base",
        layers=LAYERS,
        granularity=1,
        search="fast",
        metric="exact-match",
        calibration=PromptSet(("c-1", "c-2"), "e" * 64),
        held_out=PromptSet(("p-1", "p-2"), "f" * 64),
        full_prefill=full,
        sender_alone=MEASURES,
        sensitivity=(),
        groups=(),
        candidates=(),
        baselines=(),
        policy=policy,
        work=Work(6, 1000, 2000, 1.0),
        warnings=("2 calibration prompts",),
        provenance={
            "created": "2026-01-05T10:00:00+00:00",
            "versions": {"droidspeak": "0.0.9", "torch": "2.13.0"},
            "machine": {"cores": 2},
        },
    )
    return replace(profile, **changes)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "coder-base.json"
    write_profile_policy(path, profile_of(measured_policy(tmp_path)), CODER, BASE)
    return path


def test_what_a_profile_found_comes_back_whole(written):
    assert read_policy(written) == measured_policy(written.parent)
    artifact = read_artifact(written)
    assert (artifact.sender.side, artifact.receiver.side) == (CODER, BASE)
    profile = artifact.profile
    assert (profile.search, profile.metric, profile.granularity) == ("fast", "exact-match", 1)
    assert (profile.calibration.ids, profile.held_out.digest) == (("c-1", "c-2"), "f" * 64)
    assert profile.full_prefill.content() == profile.sender_alone.content() == MEASURES
    assert profile.warnings == ("2 calibration prompts",)
    assert artifact.versions == {"droidspeak": "0.0.9", "torch": "2.13.0"}
    assert artifact.created == datetime(2026, 1, 5, 10, tzinfo=UTC)


def test_the_source_id_of_a_side_is_the_manifests():
    for name, manifest in MANIFESTS.items():
        assert Side.of(name, manifest).source_id == manifest.source_id


def test_plans_that_somebody_vouches_for(tmp_path):
    plain = Policy.fixed(CODER.source_id, BASE.source_id, Plan.parse("0-1", LAYERS))
    path = tmp_path / "fixed.json"
    assert write_policy(path, plain, CODER, BASE) == plain == read_policy(path)
    artifact = read_artifact(path)
    assert (artifact.profile, artifact.versions) == (None, {"droidspeak": __version__})
    assert abs((datetime.now(tz=UTC) - artifact.created).total_seconds()) < 3600


floats = st.floats(0, 2, allow_nan=False)


@given(
    st.lists(st.tuples(st.sampled_from(["reuse", "0-1", "2-3", "full"]), floats), min_size=1, max_size=4),
    st.none() | st.builds(Costs, floats, floats, floats, floats),
    st.sampled_from([None, "fp8"]),
)
def test_every_number_comes_back_as_it_was(tmp_path_factory, points, costs, codec):
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), quality) for text, quality in points)
    policy = Policy(CODER.source_id, BASE.source_id, frontier, costs=costs, codec=codec)
    path = tmp_path_factory.mktemp("policy") / "p.json"
    assert write_policy(path, policy, CODER, BASE) == policy == read_policy(path)


def test_a_folder_may_be_moved(written, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    written.rename(moved / written.name)
    assert read_policy(moved / written.name).maps.path == moved / "coder-base.maps.safetensors"


def test_the_schema_in_the_docs_is_that_of_the_code():
    text = json.dumps(schema(), indent=2) + "\n"
    assert SCHEMA.read_text() == text, "write json.dumps(artifact.schema(), indent=2) to docs/schemas"


# What is refused


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"quality": 0.9,', '"quality": 0.99,'),
        ('"1-2"', '"1-3"'),
        ('"name": "coder"', '"name": "base"'),
        ('"agreement": 0.7,', '"agreement": 0.0,'),
        ("2026-01-05", "2026-01-06"),
        ("coder-base.maps", "other.maps"),
        ('"codec": null', '"codec": "fp8"'),
        ('"codec": null', '"codec": null, "note": 1'),
    ],
)
def test_a_file_that_was_changed_is_refused(written, old, new):
    text = written.read_text()
    assert text.count(old) >= 1
    written.write_text(text.replace(old, new, 1))
    with pytest.raises(PolicyError, match="was changed after it was made") as caught:
        read_policy(written)
    assert "\n" not in str(caught.value)


def test_layout_does_not_count_as_a_change(written):
    expected = read_policy(written)
    content = json.loads(written.read_text())
    written.write_text(json.dumps(dict(reversed(content.items()))))
    assert read_policy(written) == expected


def test_the_digest_is_as_documented(written):
    content = json.loads(written.read_text())
    assert content["digest"] == digest(content)


BAD = {
    "layers": (0, "layers"),
    "frontier": ([], "frontier"),
    "created": ("2026-01-05T10:00:00", "created"),
    "codec": (8, "codec"),
    "costs": (
        {"per_token": -1.0, "per_token_pair": 0, "per_mapped_token": 0, "suffix": 0},
        "costs.per_token",
    ),
    "thresholds": ({"agreement": 0.5, "kl": float("nan")}, "thresholds.kl"),
    "maps": ({"file": "../maps.safetensors", "sha256": "d" * 64}, "maps.file"),
    "note": ("hello", "note"),
    "format": ("droidspeak-policy-2", "format 'droidspeak-policy-2'; allowed is droidspeak-policy-1"),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_content_is_named_in_one_line(written, key):
    value, says = BAD[key]
    remake(written, **{key: value})
    with pytest.raises(PolicyError) as caught:
        read_policy(written)
    assert says in str(caught.value)
    assert str(written) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "says"),
    [("0-9", "layers 0-5"), ("0-1+emaps", "allowed is GROUPS"), ("0-1\n", None), ("", "allowed is GROUPS")],
)
def test_plans_are_checked(written, plan, says):
    frontier = [{"plan": plan, "quality": 1.0, "measures": None}]
    remake(written, frontier=frontier, maps=None)
    if says is None:
        assert str(read_policy(written).frontier[0].plan) == plan.strip()
        return
    with pytest.raises(PolicyError, match=says):
        read_policy(written)


def test_plans_with_maps_need_maps(written):
    remake(written, maps=None)
    with pytest.raises(PolicyError, match="has no maps"):
        read_policy(written)


@pytest.mark.parametrize("part", ["source_id", "manifest"])
def test_a_side_cannot_pass_for_another(written, part):
    content = json.loads(written.read_text())
    lie = {"source_id": OTHER.source_id, "manifest": dict(OTHER.manifest)}[part]
    remake(written, sender={**content["sender"], part: lie})
    with pytest.raises(PolicyError, match="source id of coder is not that of its manifest"):
        read_policy(written)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", f"format None; allowed is {FORMAT}"),
        (b'{"format": {"a": 1}}', "allowed is"),
    ],
)
def test_other_files_are_refused(tmp_path, content, says):
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        read_policy(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_pair(path) == (None, None)


def test_no_file(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        read_policy(tmp_path / "none.json")
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        read_policy(tmp_path)


def test_a_cut_file_is_refused_wherever_it_ends(written):
    whole = written.read_bytes()
    for end in range(0, len(whole) - 2, 97):
        written.write_bytes(whole[:end])
        with pytest.raises(PolicyError):
            read_policy(written)


def test_a_broken_file_still_names_its_pair(written):
    remake(written, layers="many")
    assert read_pair(written) == (CODER.source_id, BASE.source_id)
    remake(written, sender={"source_id": 7}, receiver=None)
    assert read_pair(written) == (None, None)


# Whom it is for


def test_require_pair(written):
    artifact = read_artifact(written)
    artifact.require_pair(CODER, BASE)
    with pytest.raises(PolicyError, match="another sender, coder: other differs in weights"):
        artifact.require_pair(OTHER, BASE)
    manifest = replace(MANIFESTS["base"], tokenizer="ids:65", adapter="lora")
    with pytest.raises(PolicyError, match="another receiver, base: tuned differs in adapter, tokenizer"):
        artifact.require_pair(CODER, Side.of("tuned", manifest))


# Writing


def test_sides_that_are_not_the_profiles_are_not_written(tmp_path):
    path = tmp_path / "policy.json"
    for sides in ((BASE, CODER), (CODER, OTHER)):
        with pytest.raises(PolicyError, match="is not the pair of its plans"):
            write_profile_policy(path, profile_of(measured_policy(tmp_path)), *sides)
    assert os.listdir(tmp_path) == []


def test_maps_must_lie_beside_the_policy(tmp_path):
    policy = measured_policy(tmp_path / "elsewhere")
    with pytest.raises(PolicyError, match="same folder"):
        write_policy(tmp_path / "policy.json", policy, CODER, BASE)
    assert os.listdir(tmp_path) == []


def test_figures_that_are_none_are_not_written(tmp_path):
    policy = measured_policy(tmp_path, thresholds=Thresholds(0.5, float("inf")))
    with pytest.raises(PolicyError, match=r"thresholds\.kl"):
        write_policy(tmp_path / "policy.json", policy, CODER, BASE)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_what_was_there(written, monkeypatch):
    before = written.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(PolicyError, match="cannot be written: No space left"):
        write_policy(written, measured_policy(written.parent), CODER, BASE)
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(PolicyError, match="cannot be written: No such file"):
        write_policy(tmp_path / "none" / "p.json", measured_policy(tmp_path / "none"), CODER, BASE)
