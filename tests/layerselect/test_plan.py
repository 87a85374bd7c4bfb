"""Plans: text, groups and transition layers."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.layerselect import Action, Group, Plan

actions = st.lists(st.sampled_from(Action), min_size=1, max_size=20).map(tuple)
plans = actions.map(Plan)
plans_without_maps = st.lists(st.sampled_from([Action.REUSE, Action.RECOMPUTE]), min_size=1, max_size=20).map(
    lambda row: Plan(tuple(row))
)


@given(plans_without_maps)
def test_text_round_trip(plan):
    assert Plan.parse(str(plan), plan.layers) == plan


@given(plans)
def test_groups_are_the_recomputed_layers_and_do_not_touch(plan):
    layers = [layer for group in plan.groups for layer in group]
    assert layers == [n for n, action in enumerate(plan.actions) if action is Action.RECOMPUTE]
    assert all(a.end + 1 < b.start for a, b in zip(plan.groups, plan.groups[1:], strict=False))
    assert plan.recomputed == len(layers)


@given(plans)
def test_every_layer_is_loaded_or_recomputed(plan):
    recomputed = {layer for group in plan.groups for layer in group}
    assert sorted([*plan.loaded, *recomputed]) == list(range(plan.layers))


@given(plans)
def test_transition_layers_are_the_recomputed_layers_after_loaded_ones(plan):
    expected = [n for n in range(1, plan.layers) if n - 1 in plan.loaded and n not in plan.loaded]
    assert list(plan.transition_layers) == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
def test_groups_in_any_order_may_overlap(ends):
    groups = [Group(min(pair), max(pair)) for pair in ends]
    plan = Plan.recompute(10, groups)
    assert {n for n in range(10) if n not in plan.loaded} == {layer for group in groups for layer in group}


@pytest.mark.parametrize(
    ("text", "groups", "transitions", "written"),
    [
        ("reuse", (), (), "reuse"),
        ("full", (Group(0, 7),), (), "full"),
        ("0-7", (Group(0, 7),), (), "full"),
        ("0-3", (Group(0, 3),), (), "0-3"),
        ("4", (Group(4, 4),), (4,), "4-4"),
        ("6-7, 2-3", (Group(2, 3), Group(6, 7)), (2, 6), "2-3,6-7"),
        ("2-3,4-5", (Group(2, 5),), (2,), "2-5"),
    ],
)
def test_examples(text, groups, transitions, written):
    plan = Plan.parse(text, 8)
    assert (plan.groups, plan.transition_layers, str(plan)) == (groups, transitions, written)


def test_a_mapped_layer_ends_a_group():
    plan = Plan((Action.MAP, Action.RECOMPUTE, Action.MAP, Action.RECOMPUTE))
    assert (plan.groups, plan.transition_layers) == ((Group(1, 1), Group(3, 3)), (1, 3))
    assert plan.loaded == (0, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "4-",
        "-4",
        "7-4",
        "a-b",
        "1-2-3",
        "0-8",
        "8",
        "1,,2",
        "+1",
        "1_0",
        "\u0661",
        "1.5",
        "0-99999999999",
    ],
)
def test_bad_text_is_one_line(text):
    with pytest.raises(UsageError, match="recompute group") as caught:
        Plan.parse(text, 8)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_plan_or_a_usage_error(text):
    with suppress(UsageError):
        assert Plan.parse(text, 8).layers == 8


@pytest.mark.parametrize("layers", [0, -1])
def test_no_layers(layers):
    with pytest.raises(UsageError, match="at least one layer"):
        Plan.recompute(layers, ())


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (3, 2)])
def test_group_bounds(start, end):
    with pytest.raises(UsageError, match="0 <= start <= end"):
        Group(start, end)
