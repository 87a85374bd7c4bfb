"""Policies, and sets of them from code and from folders."""

from __future__ import annotations

import logging
import math
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from droidspeak.errors import PolicyError, UsageError
from droidspeak.layerselect import Costs, FrontierPoint, MapFile, Plan, Policy, PolicySet
from droidspeak.layerselect.artifact import Side, write_policy

from .policyfiles import remake

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
LAYERS = 6
SIDES = {name: Side(name, {"weights": name}) for name in ("one", "two", "three")}


COSTS = Costs(1e-6)


def policy(*points: tuple[str, float], sender: str = A, receiver: str = B, maps=None) -> Policy:
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), quality) for text, quality in points)
    return Policy(sender, receiver, frontier, costs=COSTS, maps=maps)


def test_transition_layers_of_all_plans():
    assert policy(("0-1", 1.0), ("2-3", 1.0), ("2-2,4-5", 1.0)).transition_layers == {2, 4}
    assert Policy.fixed(A, B, Plan.parse("3-4", LAYERS)).transition_layers == {3}


@pytest.mark.parametrize(
    ("sender", "receiver", "frontier", "message"),
    [
        (A, B, (), "at least one plan"),
        (
            A,
            B,
            (FrontierPoint(Plan.parse("reuse", 4), 1), FrontierPoint(Plan.parse("reuse", 5), 1)),
            "one number",
        ),
        (A, A, (FrontierPoint(Plan.parse("reuse", 4), 1),), "two different models"),
        ("a", B, (FrontierPoint(Plan.parse("reuse", 4), 1),), "64 hex digits"),
        (A, B.upper(), (FrontierPoint(Plan.parse("reuse", 4), 1),), "64 hex digits"),
        (A, B, (FrontierPoint(Plan.parse("1-2+emap", 4), 1),), "has no maps"),
    ],
)
def test_bad_policies_are_one_line(sender, receiver, frontier, message):
    with pytest.raises(UsageError, match=message) as caught:
        Policy(sender, receiver, frontier)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_are_finite(number):
    with pytest.raises(UsageError, match="finite"):
        FrontierPoint(Plan.parse("reuse", 4), number)


MAPS = MapFile(Path("maps.safetensors"), "0" * 64)


def test_without_maps():
    points = [("reuse", 0.2), ("1-2", 0.6), ("1-2+emap", 0.9), ("3-3+emap+kvmap:0", 0.95), ("0-3", 1.0)]
    whole = policy(*points, maps=MAPS)
    plain = whole.without_maps()
    assert [str(point.plan) for point in plain.frontier] == ["reuse", "1-2", "0-3"]
    assert (plain.maps, plain.transition_layers, whole.transition_layers) == (None, {1}, {1, 3})
    assert (plain.sender, plain.receiver, plain.costs) == (A, B, COSTS)
    assert plain.without_maps() == plain


def test_a_policy_that_only_maps_is_none_without_maps():
    assert policy(("reuse+kvmap", 0.9), ("1-2+emap", 0.9), maps=MAPS).without_maps() is None


def test_what_a_policy_reaches():
    whole = policy(("reuse", 0.5), ("1-2+emap", 0.9), ("full", 1.0), maps=MAPS)
    assert [whole.reaches(floor) for floor in (0.5, 0.9, 0.91, 1.0)] == [True, True, False, False]
    assert [whole.without_maps().reaches(floor) for floor in (0.5, 0.9)] == [True, False]


def test_policy_set():
    one, two, other = policy(("0-1", 1.0)), policy(("2-3", 1.0)), policy(("4-5", 1.0), sender=C)
    policies = PolicySet([one, other])
    assert policies.get(A, B) is one
    assert policies.get(B, A) is None
    assert policies.for_receiver(B) == [one, other]
    assert policies.for_receiver(A) == []
    assert (policies.transition_layers(A), policies.transition_layers(C)) == (set(), {4})
    policies.add(two)
    assert (policies.get(A, B), len(policies)) == (two, 2)
    assert policies.transition_layers(A) == {2}
    assert policies.transition_layers(B) == set()


def test_policies_may_be_added_while_others_ask():
    policies = PolicySet()
    stop = threading.Event()
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            while not stop.is_set():
                policies.for_receiver(B)
                policies.transition_layers(A)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    for n in range(300):
        policies.add(policy(("0-1", 1.0), sender=f"{n:064x}"))
    stop.set()
    thread.join()
    assert not failed


# Folders


def keep(path, sender="one", receiver="two", plan="0-1") -> Policy:
    mine, theirs = SIDES[sender], SIDES[receiver]
    made = Policy.fixed(mine.source_id, theirs.source_id, Plan.parse(plan, LAYERS))
    return write_policy(path, made, mine, theirs)


def test_a_folder(tmp_path):
    made = [keep(tmp_path / "b.json"), keep(tmp_path / "a.json", sender="three")]
    (tmp_path / "notes.txt").write_text("not a policy")
    (tmp_path / ".a.json").write_text("left by an editor")
    policies = PolicySet.from_folder(tmp_path)
    assert {policies.get(one.sender, one.receiver) for one in made} == set(made)
    assert (len(policies), policies.refused) == (2, ())


def test_a_refused_file_stops_nothing(tmp_path, caplog):
    kept = keep(tmp_path / "good.json", sender="three")
    keep(tmp_path / "changed.json")
    text = (tmp_path / "changed.json").read_text()
    (tmp_path / "changed.json").write_text(text.replace('"0-1"', '"0-0"'))
    (tmp_path / "cut.json").write_text(text[:200])
    with caplog.at_level(logging.WARNING):
        policies = PolicySet.from_folder(tmp_path)
    assert policies.get(kept.sender, kept.receiver) == kept
    assert len(policies) == 1
    changed, cut = policies.refused
    pair = SIDES["one"].source_id, SIDES["two"].source_id
    assert (changed.path.name, changed.sender, changed.receiver) == ("changed.json", *pair)
    assert "was changed after it was made" in changed.reason
    assert (cut.path.name, cut.sender, cut.receiver) == ("cut.json", None, None)
    assert policies.refused_senders(pair[1]) == [pair[0]]
    assert policies.refused_senders(pair[0]) == []
    assert [record.message.count(".json") for record in caplog.records] == [1, 1]


def test_a_pair_with_another_file_is_not_refused(tmp_path):
    made = keep(tmp_path / "good.json")
    text = (tmp_path / "good.json").read_text()
    (tmp_path / "bad.json").write_text(text.replace('"0-1"', '"0-0"'))
    policies = PolicySet.from_folder(tmp_path)
    assert len(policies.refused) == 1
    assert policies.refused_senders(made.receiver) == []
    assert policies.get(made.sender, made.receiver) == made


@pytest.mark.parametrize(("first", "second"), [("a.json", "b.json"), ("b.json", "a.json")])
def test_of_two_files_of_a_pair_the_later_made_counts(tmp_path, first, second):
    keep(tmp_path / first, plan="0-1")
    later = keep(tmp_path / second, plan="0-2")
    remake(tmp_path / second, created=(datetime.now(tz=UTC) + timedelta(hours=1)).isoformat())
    assert PolicySet.from_folder(tmp_path).get(later.sender, later.receiver) == later


def test_no_folder(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        PolicySet.from_folder(tmp_path / "none")
