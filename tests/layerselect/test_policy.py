"""Policies, and the choice among their plans."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.layerselect import Action, FrontierPoint, Plan, Policy, PolicySet, Requirement, choose

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
LAYERS = 6

qualities = st.floats(0.0, 1.1) | st.sampled_from([0.9, 0.95])
plans = st.lists(st.sampled_from(Action), min_size=LAYERS, max_size=LAYERS).map(lambda row: Plan(tuple(row)))
frontiers = st.lists(st.builds(FrontierPoint, plans, qualities), min_size=1, max_size=12).map(tuple)


def policy(*points: tuple[str, float], sender: str = A, receiver: str = B) -> Policy:
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), quality) for text, quality in points)
    return Policy(sender, receiver, frontier)


@given(frontiers, qualities)
def test_never_below_the_floor_and_never_more_layers_than_needed(frontier, floor):
    chosen = choose(Policy(A, B, frontier), Requirement(floor))
    allowed = [point for point in frontier if point.quality >= floor]
    if chosen is None:
        assert not allowed
    else:
        assert chosen in [point.plan for point in allowed]
        assert chosen.recomputed == min(point.plan.recomputed for point in allowed)


@given(frontiers, qualities, st.randoms())
def test_the_order_of_the_frontier_is_of_no_account(frontier, floor, random):
    shuffled = random.sample(frontier, len(frontier))
    assert choose(Policy(A, B, frontier), Requirement(floor)) == choose(
        Policy(A, B, tuple(shuffled)), Requirement(floor)
    )


def test_better_quality_wins_among_equals_then_the_earlier_group():
    assert str(choose(policy(("0-1", 0.96), ("2-3", 0.97)), Requirement())) == "2-3"
    twelve = [FrontierPoint(Plan.parse(text, 12), 1.0) for text in ("10-11", "2-3")]
    assert str(choose(Policy(A, B, tuple(twelve)), Requirement())) == "2-3"


def test_the_floor_itself_is_allowed():
    assert str(choose(policy(("0-1", 0.95)), Requirement(0.95))) == "0-1"


def test_nothing_reaches_the_floor():
    assert choose(policy(("reuse", 0.2), ("0-3", 0.9)), Requirement()) is None


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
    with pytest.raises(UsageError, match="finite"):
        Requirement(number)


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
