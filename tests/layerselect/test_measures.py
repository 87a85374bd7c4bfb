"""Summaries of scores, and the Pareto set of what was measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.layerselect import CacheBlend, Group, Measures, Plan, ReuseOne, Score
from droidspeak.layerselect.measures import confidence
from droidspeak.layerselect.profile import Finding, pareto

LAYERS = 6

shares = st.floats(0, 1)
scores = st.builds(Score, shares, st.floats(0, 5), shares)


@given(st.dictionaries(st.text(min_size=1, max_size=3), scores, min_size=1, max_size=8))
def test_a_summary_lies_within_what_it_sums_up(rows):
    found = Measures.of(rows)
    for name in ("quality", "kl", "agreement"):
        values = [getattr(score, name) for score in rows.values()]
        assert math.isclose(getattr(found, name), math.fsum(values) / len(values), abs_tol=1e-12)
    assert found.prompts == len(rows)
    assert found.worst == rows[found.worst_prompt]
    assert found.worst.quality == min(score.quality for score in rows.values())
    assert found.low <= found.high


def test_of_equally_bad_prompts_the_most_divergent_is_named():
    rows = {"a": Score(0, 1, 0.5), "b": Score(0, 3, 0.5), "c": Score(1, 9, 0)}
    assert Measures.of(rows).worst_prompt == "b"


def test_the_interval_is_the_same_each_time_and_covers_the_mean():
    values = [0.0] * 4 + [1.0] * 12
    low, high = confidence(values)
    assert (low, high) == confidence(values)
    # Binomial, n = 16, p = 3/4: 95 % lie within about 0.21 of the mean.
    assert low == pytest.approx(0.54, abs=0.07)
    assert high == pytest.approx(0.96, abs=0.07)
    assert confidence([1.0] * 5) == (1.0, 1.0)


def measured(quality: float, kl: float = 0.0) -> Measures:
    return Measures.of({"p": Score(quality, kl, 1.0)})


def finding(text: str, share: float, kl: float = 0.0) -> Finding:
    return Finding(Plan.parse(text, LAYERS), measured(min(share, 1.0), kl), share)


plans = st.sampled_from(
    [Plan.recompute(LAYERS, [Group(a, b)], map_e=e) for a in range(6) for b in range(a, 6) for e in (0, 1)]
)
findings = st.lists(
    st.builds(Finding, plans, st.just(measured(1.0)), st.sampled_from([0.5, 0.9, 0.95, 1.0])),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one.method,
)


def rank(plan: Plan, quality: float) -> tuple[int, int, float]:
    return plan.recomputed, plan.maps, -quality


def as_good(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


@given(findings)
def test_no_point_beats_another_and_everything_else_is_beaten_by_one(found):
    points = pareto(found)
    ranks = [rank(point.plan, point.quality) for point in points]
    assert ranks == sorted(set(ranks))
    assert not any(as_good(a, b) for a in ranks for b in ranks if a != b)
    assert all(any(as_good(best, rank(one.method, one.share)) for best in ranks) for one in found)
    measured_plans = {one.method: one.share for one in found}
    assert all(measured_plans[point.plan] == point.quality for point in points)


@given(findings, st.randoms())
def test_the_order_of_findings_is_of_no_account(found, random):
    assert pareto(random.sample(found, len(found))) == pareto(found)


def test_among_equals_fewer_maps_win_then_less_divergence():
    found = [finding("1-2+emap", 0.9, 0.1), finding("1-2", 0.9, 0.2), finding("3-4", 0.9, 0.1)]
    assert [str(point.plan) for point in pareto(found)] == ["3-4"]


def test_a_mapped_plan_is_a_point_where_it_is_better_than_a_plain_one_of_its_size():
    found = [finding("1-2", 0.9), finding("1-2+emap", 0.95), finding("0-2", 0.93), finding("0-3", 0.97)]
    assert [str(point.plan) for point in pareto(found)] == ["1-2", "1-2+emap", "0-2", "0-3"]


def test_only_plans_are_points_and_measures_come_with_them():
    one = finding("0-1", 0.9)
    others = [Finding(method, measured(1.0), 1.0) for method in (ReuseOne(1), CacheBlend(0.1))]
    (point,) = pareto([*others, one])
    assert (point.plan, point.measures) == (one.method, one.measures)
    assert [other.recomputed for other in others] == [None, None]
