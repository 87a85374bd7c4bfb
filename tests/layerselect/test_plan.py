"""Plans: text, groups and transition layers."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.layerselect import Action, Group, Plan


@st.composite
def plans(draw):
    """Any plan; with E mapped only where a group starts from one."""
    count = draw(st.integers(1, 20))
    plan = Plan(tuple(draw(st.lists(st.sampled_from(Action), min_size=count, max_size=count))))
    return Plan(plan.actions, map_e=bool(plan.transition_layers) and draw(st.booleans()))


@given(plans())
def test_text_round_trip(plan):
    assert Plan.parse(str(plan), plan.layers) == plan


@given(plans())
def test_a_plan_is_what_it_says_of_itself(plan):
    assert Plan.recompute(plan.layers, plan.groups, map_e=plan.map_e, mapped=plan.mapped) == plan
    assert set(plan.mapped) <= set(plan.loaded)
    assert plan.needs_maps == ("map" in str(plan))


@given(plans())
def test_groups_are_the_recomputed_layers_and_do_not_touch(plan):
    layers = [layer for group in plan.groups for layer in group]
    assert layers == [n for n, action in enumerate(plan.actions) if action is Action.RECOMPUTE]
    assert all(a.end + 1 < b.start for a, b in zip(plan.groups, plan.groups[1:], strict=False))
    assert plan.recomputed == len(layers)


@given(plans())
def test_every_layer_is_loaded_or_recomputed(plan):
    recomputed = {layer for group in plan.groups for layer in group}
    assert sorted([*plan.loaded, *recomputed]) == list(range(plan.layers))


@given(plans())
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
        "-",
        "4-",
        "-4",
        "7-4",
        "a-b",
        "1-2-3",
        "0-8",
        "8",
        "1,,2",
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "allowed is GROUPS"),
        ("+1", "allowed is GROUPS"),
        ("+emap", "allowed is GROUPS"),
        ("1-2+emaps", "allowed is GROUPS"),
        ("1-2+kvmap+emap", "allowed is GROUPS"),
        ("1-2+kvmap:", "allowed is GROUPS"),
        ("1-2+kvmap:8", "mapped layer 8: the model has layers 0-7"),
        ("1-2+kvmap:x", "recompute group 'x'"),
        ("0-2+emap", "no group starts from an E"),
        ("reuse+emap", "no group starts from an E"),
        ("full+emap", "no group starts from an E"),
    ],
)
def test_bad_maps_are_one_line(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        Plan.parse(text, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "mapped", "map_e", "written"),
    [
        ("1-2+emap", (), True, "1-2+emap"),
        ("1-2+kvmap", (0, 3, 4, 5, 6, 7), False, "1-2+kvmap"),
        ("1-2+kvmap:0,3-7", (0, 3, 4, 5, 6, 7), False, "1-2+kvmap"),
        ("1-2+emap+kvmap:0", (0,), True, "1-2+emap+kvmap:0"),
        ("1-2+kvmap:0-4", (0, 3, 4), False, "1-2+kvmap:0,3-4"),
        ("reuse+kvmap", tuple(range(8)), False, "reuse+kvmap"),
        ("full+kvmap", (), False, "full"),
    ],
)
def test_maps(text, mapped, map_e, written):
    plan = Plan.parse(text, 8)
    assert (plan.mapped, plan.map_e, str(plan)) == (mapped, map_e, written)


def test_e_is_mapped_only_where_a_group_starts_from_one():
    assert not Plan.recompute(4, [Group(0, 1)], map_e=True).map_e
    with pytest.raises(UsageError, match="no group starts from an E"):
        Plan((Action.RECOMPUTE, Action.REUSE), map_e=True)


@given(st.text(max_size=12) | st.text(alphabet="0123-,+:emapkv", max_size=16))
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
