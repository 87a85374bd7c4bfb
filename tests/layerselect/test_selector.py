"""The choice of a plan: floor, load, bandwidth, SLO."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.layerselect import (
    Action,
    Costs,
    FrontierPoint,
    MapFile,
    Plan,
    Policy,
    Requirement,
    Situation,
    choose,
    predicted_ttft,
)

A, B = "a" * 64, "b" * 64
LAYERS = 6
MAPS = MapFile(Path("maps.safetensors"), "c" * 64)

qualities = st.floats(0.0, 1.1) | st.sampled_from([0.9, 0.95])


@st.composite
def plans(draw):
    plan = Plan(tuple(draw(st.lists(st.sampled_from(Action), min_size=LAYERS, max_size=LAYERS))))
    return Plan(plan.actions, map_e=bool(plan.transition_layers) and draw(st.booleans()))


groups = st.integers(0, LAYERS - 1).flatmap(
    lambda start: st.integers(start, LAYERS - 1).map(lambda end: Plan.parse(f"{start}-{end}", LAYERS))
)
frontiers = st.lists(st.builds(FrontierPoint, plans() | groups, qualities), min_size=1, max_size=12).map(
    tuple
)
costs = st.builds(
    Costs,
    per_token=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]),
    per_token_pair=st.sampled_from([0.0, 1e-10, 1e-7]),
    per_mapped_token=st.sampled_from([0.0, 1e-8, 1e-5, 1e-2]),
    suffix=st.sampled_from([0.0, 0.01]),
)
policies = st.builds(
    lambda frontier, prices: Policy(A, B, frontier, costs=prices, maps=MAPS), frontiers, costs
)
bandwidths = st.integers(3, 12 * 4).map(lambda n: 10 ** (n / 4))
slos = st.none() | st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 1e3])
requirements = st.builds(Requirement, qualities, slos)
situations = st.builds(
    Situation,
    tokens=st.integers(0, 20_000),
    kv_bytes=st.sampled_from([64, 4096]),
    e_bytes=st.sampled_from([32, 8192, 65536]),
    bandwidth=st.none() | bandwidths,
    queue_depth=st.integers(0, 2),
)


def policy(*points: tuple[str, float], costs: Costs | None = None) -> Policy:
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), quality) for text, quality in points)
    return Policy(A, B, frontier, costs=costs, maps=MAPS)


def allowed(policy: Policy, requirement: Requirement) -> list[FrontierPoint]:
    return [point for point in policy.frontier if point.quality >= requirement.quality_floor]


@given(policies, requirements, st.none() | situations)
def test_never_below_the_floor_and_never_fewer_layers_than_the_cheapest(policy, requirement, situation):
    chosen = choose(policy, requirement, situation)
    points = allowed(policy, requirement)
    if chosen is None:
        assert not points
    else:
        assert chosen in [point.plan for point in points]


@given(policies, requirements, situations)
def test_without_a_situation_or_costs_the_fewest_layers(policy, requirement, situation):
    fewest = choose(policy, requirement)
    assert choose(replace(policy, costs=None), requirement, situation) == fewest
    if fewest is not None:
        assert fewest.recomputed == min(point.plan.recomputed for point in allowed(policy, requirement))


@given(policies, requirements, situations)
def test_a_queue_gets_the_least_computing(policy, requirement, situation):
    chosen = choose(policy, requirement, replace(situation, queue_depth=1))
    if chosen is not None:
        free = replace(situation, bandwidth=None)
        times = [predicted_ttft(policy.costs, point.plan, free) for point in allowed(policy, requirement)]
        assert predicted_ttft(policy.costs, chosen, free) == pytest.approx(min(times))


@given(policies, requirements, st.none() | situations, st.randoms())
def test_the_order_of_the_frontier_is_of_no_account(policy, requirement, situation, random):
    shuffled = replace(policy, frontier=tuple(random.sample(policy.frontier, len(policy.frontier))))
    assert choose(shuffled, requirement, situation) == choose(policy, requirement, situation)


@given(policies, requirements, situations)
def test_more_load_never_recomputes_more(policy, requirement, situation):
    idle, busy = (choose(policy, requirement, replace(situation, queue_depth=n)) for n in (0, 1))
    if idle is not None:
        assert busy.recomputed <= idle.recomputed


@given(policies, requirements, situations, bandwidths, bandwidths)
def test_less_bandwidth_never_recomputes_less(policy, requirement, situation, one, other):
    slow, fast = (
        choose(policy, requirement, replace(situation, bandwidth=speed)) for speed in sorted([one, other])
    )
    if slow is not None:
        assert slow.recomputed >= fast.recomputed


@given(policies, requirements, situations, slos, slos)
def test_more_time_never_recomputes_less(policy, requirement, situation, one, other):
    short, long = sorted([slo or 1e-9 for slo in (one, other)])
    chosen = [choose(policy, replace(requirement, slo=slo), situation) for slo in (short, long)]
    if None not in chosen:
        assert chosen[0].recomputed <= chosen[1].recomputed


def charged(policy: Policy, plan: Plan, points: list[FrontierPoint], situation: Situation) -> float:
    """The prediction if every plan that loads loaded as much E as any."""
    costs, n = policy.costs, situation.tokens
    most = max(len(point.plan.transition_layers) for point in points) if plan.loaded else 0
    maps = len(plan.mapped) + plan.map_e * len(plan.transition_layers)
    recompute = plan.recomputed * (costs.per_token * n + costs.per_token_pair * n * n)
    compute = recompute + maps * costs.per_mapped_token * n
    rate = n / situation.bandwidth
    load_e, load = most * situation.e_bytes * rate, len(plan.loaded) * situation.kv_bytes * rate
    return max(load_e + compute, load) + costs.suffix


@given(policies, qualities, situations, bandwidths)
def test_idle_and_without_an_slo_no_plan_is_predicted_to_be_faster(policy, floor, situation, bandwidth):
    requirement, situation = Requirement(floor), replace(situation, bandwidth=bandwidth, queue_depth=0)
    chosen, points = choose(policy, requirement, situation), allowed(policy, requirement)
    if chosen is not None:
        best = min(charged(policy, point.plan, points, situation) for point in points)
        assert charged(policy, chosen, points, situation) <= best * (1 + 1e-9)


@given(policies, qualities, situations, slos.filter(bool))
def test_an_slo_is_used_up_by_recompute(policy, floor, situation, slo):
    situation = replace(situation, queue_depth=0)
    chosen, points = choose(policy, Requirement(floor, slo), situation), allowed(policy, Requirement(floor))
    computing = replace(situation, bandwidth=None)
    within = [p.plan for p in points if predicted_ttft(policy.costs, p.plan, computing) <= slo]
    if within:
        assert chosen.recomputed >= max(plan.recomputed for plan in within)


def test_predicted_ttft():
    costs = Costs(1e-4, 1e-8, 1e-5, suffix=0.5)
    situation = Situation(tokens=1000, kv_bytes=100, e_bytes=200, bandwidth=1e6)
    # 2 layers of 0.1 s + 0.01 s, E in 0.2 s; 4 layers in 0.4 s.
    assert predicted_ttft(costs, Plan.parse("1-2", 6), situation) == pytest.approx(0.2 + 0.22 + 0.5)
    # Mapping K and V of 4 layers and E of one, 0.01 s each.
    assert predicted_ttft(costs, Plan.parse("1-2+emap+kvmap", 6), situation) == pytest.approx(0.97)
    assert predicted_ttft(costs, Plan.parse("reuse", 6), situation) == pytest.approx(0.6 + 0.5)
    assert predicted_ttft(costs, Plan.parse("full", 6), situation) == pytest.approx(0.66 + 0.5)
    unknown = replace(situation, bandwidth=None)
    assert predicted_ttft(costs, Plan.parse("reuse", 6), unknown) == pytest.approx(0.5)


def test_a_slow_tier_gets_more_recompute_and_the_slowest_full_prefill():
    made = policy(("0-0", 1.0), ("0-2", 1.0), ("full", 1.0), costs=Costs(1e-4))
    situation = Situation(tokens=1000, kv_bytes=1000, e_bytes=1000)
    texts = [
        str(choose(made, Requirement(), replace(situation, bandwidth=speed))) for speed in (1e9, 1.3e7, 1e5)
    ]
    assert texts == ["0-0", "0-2", "full"]


def test_maps_that_cost_more_than_the_layers_they_save_are_not_worth_it():
    made = policy(("1-1+kvmap", 1.0), ("0-3", 1.0), costs=Costs(1e-6, per_mapped_token=1e-5))
    situation = Situation(tokens=1000, kv_bytes=1, e_bytes=1, bandwidth=1e12)
    assert str(choose(made, Requirement(), situation)) == "0-3"
    assert str(choose(made, Requirement(), replace(situation, queue_depth=1))) == "0-3"
    assert str(choose(replace(made, costs=None), Requirement(), situation)) == "1-1+kvmap"


def test_time_that_an_slo_leaves_is_spent_on_recompute_even_if_the_bandwidth_is_unknown():
    made = policy(("0-0", 0.96), ("0-2", 0.98), ("full", 1.0), costs=Costs(1e-4, suffix=0.1))
    situation = Situation(tokens=1000, kv_bytes=1, e_bytes=1)
    for bandwidth in (None, 1e12):
        met = replace(situation, bandwidth=bandwidth)
        slos = {slo: str(choose(made, Requirement(slo=slo), met)) for slo in (0.1, 0.45, 0.8)}
        assert slos == {0.1: "0-0", 0.45: "0-2", 0.8: "full"}
    assert str(choose(made, Requirement(slo=0.8), replace(situation, queue_depth=3))) == "0-0"


def test_better_quality_wins_among_equals_then_fewer_maps_then_the_earlier_group():
    assert str(choose(policy(("0-1", 0.96), ("2-3", 0.97)), Requirement())) == "2-3"
    assert str(choose(policy(("0-1+kvmap", 1.0), ("2-3", 1.0)), Requirement())) == "2-3"
    twelve = [FrontierPoint(Plan.parse(text, 12), 1.0) for text in ("10-11", "2-3")]
    assert str(choose(Policy(A, B, tuple(twelve)), Requirement())) == "2-3"


def test_the_floor_itself_is_allowed():
    assert str(choose(policy(("0-1", 0.95)), Requirement(0.95))) == "0-1"


def test_nothing_reaches_the_floor():
    assert choose(policy(("reuse", 0.2), ("0-3", 0.9)), Requirement()) is None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_the_floor_is_finite(number):
    with pytest.raises(UsageError, match="finite"):
        Requirement(number)


@pytest.mark.parametrize("number", [0, -1, math.nan, math.inf])
def test_times_and_speeds_are_positive(number):
    with pytest.raises(UsageError, match="positive"):
        Requirement(slo=number)
    with pytest.raises(UsageError, match="positive"):
        Situation(1, 1, 1, bandwidth=number)


@pytest.mark.parametrize("values", [(-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_amounts_are_not_negative(values):
    with pytest.raises(UsageError, match="0 and more"):
        Situation(*values)
