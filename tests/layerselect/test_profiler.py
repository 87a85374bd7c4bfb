"""The profiler, over a made-up pair whose scores follow from rules: it must find what the rules say."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import MissingExtra, UsageError
from droidspeak.layerselect import CacheBlend, Group, MapFile, Method, Plan, ReuseOne, Score
from droidspeak.layerselect.methods import parse_method
from droidspeak.layerselect.profiler import (
    Pair,
    ProfileOptions,
    Profiler,
    Search,
    contiguous_groups,
    mapped_plans,
    split,
)
from droidspeak.layerselect.tasks import SENDER_ALONE, Question, Result, Task, Timing, Unit

LAYERS = 6
PAIR = Pair("a" * 64, "b" * 64, "teacher", "pupil", LAYERS)
CRITICAL = {1, 2}


def units(name: str, count: int, questions: int = 4) -> list[Unit]:
    return [
        Unit((n,) * 10, tuple(Question(f"{name}-{n}-{q}", (1,), ("x",)) for q in range(questions)))
        for n in range(count)
    ]


class World:
    """Layers 1 and 2 are critical; E of a later layer is off unless it is mapped; maps of `good` are good."""

    def __init__(self, sender_alone: float = 0.2, full: float = 1.0) -> None:
        self.tasks: list[tuple[str, Task]] = []
        self.sender_alone, self.full = sender_alone, full

    def __call__(self, title: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        self.tasks += [(title, task) for task in tasks]
        # Workers answer in any order.
        for task in reversed(tasks):
            yield task, self.result(task)

    def result(self, task: Task) -> Result:
        good = task.maps is not None and task.maps.path.name == "good"
        scores = {}
        for text in task.methods:
            loss = self.loss(parse_method(text, LAYERS), good)
            score = Score(max(0.0, self.full - loss) if task.generate else 2.7**-loss, loss, 1 - loss / 2)
            scores[text] = {question.id: score for question in task.unit.questions}
        if task.sender_alone:
            scores[SENDER_ALONE] = {q.id: Score(self.sender_alone, 0, 0) for q in task.unit.questions}
        runs = [(LAYERS - start, len(task.unit.prefix)) for start in range(LAYERS)]
        return Result(scores, runs, [Timing(2, 10, 0.2)], [], [0.01])

    @staticmethod
    def loss(method: Method, good: bool) -> float:
        if isinstance(method, CacheBlend):
            return 0.6 * (1 - method.ratio)
        if isinstance(method, ReuseOne):
            return 0.3 if method.layer in CRITICAL else 0.01
        lost = 0.3 * len(CRITICAL & set(method.loaded)) + 0.01 * len(method.loaded)
        if method.transition_layers and not (method.map_e and good):
            lost += 0.2 * len(method.transition_layers)
        return min(1.0, lost)


def profiler(world: World, maps: Sequence[str] = (), **options) -> Profiler:
    files = {name: MapFile(Path(name), "0" * 64) for name in maps}
    return Profiler(PAIR, ProfileOptions(**options), world, units("c", 4), units("h", 3), files)


@pytest.mark.parametrize("search", Search)
def test_the_frontier_is_what_the_rules_say(search):
    profile = profiler(World(), search=search).profile()
    best = {point.plan.recomputed: str(point.plan) for point in profile.policy.frontier}
    # A group from layer 0 needs no E: one layer more is better than a wrong E.
    assert best[0] == "reuse"
    assert best[3] == "0-2"
    assert best[LAYERS] == "full"
    assert profile.search == search
    qualities = [point.quality for point in profile.policy.frontier]
    assert qualities == sorted(qualities)
    assert all(point.measures is not None for point in profile.policy.frontier)


def test_good_maps_save_a_layer_and_bad_maps_are_not_taken():
    profile = profiler(World(), maps=["bad", "good"]).profile()
    assert profile.map_features == "good"
    best = {point.plan.recomputed: point.plan for point in profile.policy.frontier}
    assert str(best[2]).startswith("1-2+emap")
    assert profile.policy.maps == MapFile(Path("good"), "0" * 64)
    without = profiler(World(), maps=["bad"]).profile()
    assert not any(point.plan.needs_maps for point in without.policy.frontier)
    assert without.policy.maps is None


def test_the_best_kind_of_maps_is_fitted_once_more_before_it_is_measured():
    world, again = World(), MapFile(Path("again") / "good", "1" * 64)
    asked = []

    def refit(kind: str) -> MapFile:
        asked.append(kind)
        return again

    files = {name: MapFile(Path(name), "0" * 64) for name in ("bad", "good")}
    made = Profiler(PAIR, ProfileOptions(), world, units("c", 4), units("h", 3), files, refit)
    assert made.profile().policy.maps == again
    assert asked == ["good"]
    assert {task.maps for title, task in world.tasks if title == "held-out prompts"} == {again}


def test_fast_needs_no_answers_to_choose_and_held_out_prompts_are_always_answered():
    world = World()
    profiler(world).profile()
    assert {task.generate for title, task in world.tasks if title == "groups"} == {False}
    assert {task.generate for title, task in world.tasks if title == "held-out prompts"} == {True}
    full = World()
    profiler(full, search=Search.FULL).profile()
    assert {task.generate for title, task in full.tasks if title == "groups"} == {True}


def test_fast_uses_a_few_prompts_of_every_prefix_and_full_uses_all():
    for search, expected in ((Search.FAST, 6), (Search.FULL, 16)):
        world = World()
        profile = profiler(world, search=search, prompts=6).profile()
        assert len(profile.calibration.ids) == expected
        assert len({name.split("-")[1] for name in profile.calibration.ids}) == 4
        assert len(profile.held_out.ids) == 12


def test_one_run_per_start_is_counted_against_one_run_per_group():
    work = profiler(World()).profile().work
    assert work.layer_tokens == 4 * 10 * LAYERS * (LAYERS + 1) // 2
    assert work.each_group == 4 * 10 * sum(len(group) for group in contiguous_groups(LAYERS, 1))


def test_a_receiver_that_does_not_beat_the_sender_is_warned_about():
    assert not profiler(World(sender_alone=0.2)).profile().warnings
    (warning,) = profiler(World(sender_alone=1.0)).profile().warnings
    assert "the sender alone scores 1.000, the receiver 1.000" in warning


def test_few_prompts_are_warned_about():
    small = Profiler(PAIR, ProfileOptions(), World(), units("c", 1, 3), units("h", 2))
    assert any("3 calibration prompts" in warning for warning in small.profile().warnings)


def test_a_receiver_that_fails_its_own_prompts_cannot_be_profiled():
    with pytest.raises(UsageError, match="scores 0 by exact-match"):
        profiler(World(full=0.0)).profile()


def test_baselines_cost_what_plans_cost():
    profile = profiler(World()).profile()
    blends = [found.method for found in profile.baselines if isinstance(found.method, CacheBlend)]
    assert [blend.layer_equivalents(LAYERS) for blend in blends] == pytest.approx([1, 2, 3])
    scattered = [found.method for found in profile.baselines if isinstance(found.method, Plan)]
    assert [str(plan) for plan in scattered] == ["reuse", "1-1", "1-2", "0-2"]
    assert [found.method for found in profile.sensitivity] == [ReuseOne(layer) for layer in range(LAYERS)]


def test_without_baselines_only_plans_are_measured():
    profile = profiler(World(), baselines=False).profile()
    assert profile.sensitivity == ()
    assert [str(found.method) for found in profile.baselines] == ["reuse"]


def test_windows_leave_out_cacheblend():
    profile = profiler(World(), blend=False).profile()
    assert not any(isinstance(found.method, CacheBlend) for found in profile.baselines)


@pytest.mark.parametrize(("layers", "granularity", "count"), [(32, 1, 528), (32, 2, 136), (8, 3, 6)])
def test_as_many_groups_as_the_paper_counts(layers, granularity, count):
    assert len(contiguous_groups(layers, granularity)) == count


@given(st.integers(1, 20), st.integers(1, 8))
def test_groups_are_different_contiguous_and_keep_to_the_granularity(layers, granularity):
    groups = contiguous_groups(layers, granularity)
    assert len(set(groups)) == len(groups)
    for group in groups:
        assert group.start % granularity == 0
        assert (group.end + 1) % granularity == 0 or group.end == layers - 1
    assert Group(0, layers - 1) in groups


@given(st.integers(1, 12))
def test_mapped_plans_all_map_and_stand_once(layers):
    plans = mapped_plans(layers, contiguous_groups(layers, 1))
    assert all(plan.needs_maps for plan in plans)
    assert len(set(map(str, plans))) == len(plans)


def test_maps_are_fitted_on_other_prefixes_than_plans_are_chosen_by():
    fitted, others = split(units("c", 5))
    assert {unit.prefix for unit in fitted} & {unit.prefix for unit in others} == set()
    assert len(fitted) + len(others) == 5


@pytest.mark.parametrize("options", [{"metric": "bleu"}, {"granularity": 0}, {"prompts": 0}])
def test_options_that_are_not_allowed(options):
    with pytest.raises(UsageError, match="allowed"):
        ProfileOptions(**options)


def test_a_metric_whose_extra_is_missing_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(MissingExtra, match=r"droidspeak\[profile\]"):
        ProfileOptions(metric="rouge-l")
