"""The drift guard: what is sampled, when a pair goes out of service, and when it comes back."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from droidspeak.errors import ConfigError
from droidspeak.layerselect import Plan, Policy, Thresholds
from droidspeak.layerselect.drift import DriftGuard, DriftOptions

LIMITS = Thresholds(agreement=0.8, kl=1.0)
POLICY = replace(Policy.fixed("a" * 64, "b" * 64, Plan.parse("reuse", 4)), thresholds=LIMITS)
OTHER = replace(POLICY, sender="c" * 64)
GOOD, BAD = (1.0, 0.0), (0.2, 3.0)

options = st.builds(
    lambda least, more: DriftOptions(window=least + more, least=least), st.integers(2, 9), st.integers(0, 9)
)
samples = st.tuples(st.floats(0, 1), st.floats(0, 5))


def observe(guard: DriftGuard, *found, policy: Policy = POLICY) -> list[bool]:
    return [guard.observe(policy, *sample) for sample in found]


def drifted(options: DriftOptions | None = None) -> DriftGuard:
    guard = DriftGuard(options)
    observe(guard, *[BAD] * guard.options.least)
    assert not guard.allowed(POLICY)
    return guard


# Sampling


@given(st.floats(0.001, 1), st.integers(1, 300))
def test_samples_are_as_many_as_asked_for_and_spread_evenly(rate, requests):
    guard = DriftGuard(DriftOptions(sample_rate=rate))
    taken = [guard.sample(POLICY) for _ in range(requests)]
    assert taken[0]
    for end in range(1, requests + 1):
        assert abs(sum(taken[:end]) - end * rate) <= 1 + 1e-6


@pytest.mark.parametrize(("rate", "every"), [(1, 1), (0.1, 10), (0.01, 100)])
def test_every_nth_request(rate, every):
    guard = DriftGuard(DriftOptions(sample_rate=rate))
    assert [n for n in range(5 * every) if guard.sample(POLICY)] == [n * every for n in range(5)]


def test_a_rate_of_nothing_samples_nothing():
    guard = DriftGuard(DriftOptions(sample_rate=0))
    assert not any(guard.sample(POLICY) for _ in range(100))


def test_a_drifted_pair_is_sampled_more():
    guard = drifted(DriftOptions(sample_rate=0.01, recovery_rate=0.5))
    assert sum(guard.sample(POLICY) for _ in range(100)) == 50
    often = drifted(DriftOptions(sample_rate=1, recovery_rate=0.5))
    assert all(often.sample(POLICY) for _ in range(10))


# Drift and recovery


@given(options, st.data())
def test_never_on_less_than_the_least_samples(options, data):
    guard = DriftGuard(options)
    found = data.draw(st.lists(samples, max_size=options.least - 1))
    assert not any(observe(guard, *found))
    assert guard.allowed(POLICY)


@given(options, st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.floats(0) | st.just(math.nan))
def test_a_single_bad_sample_never_decides(options, before, after, agreement, kl):
    guard = DriftGuard(options)
    assert not any(observe(guard, *[GOOD] * before, (agreement, kl), *[GOOD] * after))


@given(options, st.lists(st.tuples(st.floats(0.8, 1), st.floats(0, 1)), max_size=60))
def test_samples_within_the_thresholds_never_drift(options, found):
    assert not any(observe(DriftGuard(options), *found))


@given(options, st.sampled_from(["agreement", "kl"]), st.data())
def test_samples_beyond_one_threshold_always_drift(options, which, data):
    bad = st.tuples(st.floats(0, 0.79), st.just(0.0))
    if which == "kl":
        bad = st.tuples(st.just(1.0), st.floats(1.01, 50) | st.just(math.nan) | st.just(math.inf))
    found = data.draw(st.lists(bad, min_size=options.least, max_size=options.least))
    guard = DriftGuard(options)
    assert observe(guard, *found) == [*[False] * (options.least - 1), True]
    assert not guard.allowed(POLICY)


@given(options)
def test_good_samples_bring_a_pair_back_and_keep_it(options):
    guard = drifted(options)
    assert observe(guard, *[GOOD] * options.window) == [*[False] * (options.window - 1), True]
    assert guard.allowed(POLICY)
    assert not any(observe(guard, *[GOOD] * 50))


@given(options, st.integers(0, 30))
def test_bad_samples_are_forgotten_in_the_end(options, bad):
    guard = drifted(options)
    observe(guard, *[BAD] * bad, *[GOOD] * options.window)
    assert guard.allowed(POLICY)


@pytest.mark.parametrize("sample", [(0.81, 0.0), (1.0, 0.95)])
def test_a_pair_on_the_edge_does_not_come_and_go(sample):
    within = DriftGuard()
    assert not any(observe(within, *[sample] * 100))
    assert not any(observe(drifted(), *[sample] * 100))


def test_a_pair_comes_back_even_where_the_thresholds_are_perfection():
    policy = replace(POLICY, thresholds=Thresholds(agreement=1.0, kl=0.0))
    guard = DriftGuard()
    observe(guard, *[BAD] * 8, policy=policy)
    assert not guard.allowed(policy)
    observe(guard, *[GOOD] * 64, policy=policy)
    assert guard.allowed(policy)


def test_a_few_good_answers_in_a_row_do_not_bring_a_pair_back():
    guard = drifted(DriftOptions(least=4, window=12))
    assert not any(observe(guard, *([GOOD] * 6 + [BAD] * 6) * 10))


def test_old_samples_leave_the_window():
    guard = DriftGuard(DriftOptions(window=8))
    assert not any(observe(guard, *[GOOD] * 1000, BAD, BAD))
    assert any(observe(guard, *[BAD] * 6))


# Pairs and policies


def test_pairs_are_apart():
    guard = drifted()
    assert guard.allowed(OTHER)
    assert guard.sample(OTHER)
    assert [(state.sender, state.drifted) for state in guard.states()] == [
        (POLICY.sender, True),
        (OTHER.sender, False),
    ]


def test_a_pair_that_was_profiled_again_starts_afresh():
    guard = drifted()
    again = replace(POLICY, thresholds=Thresholds(agreement=0.1, kl=5.0))
    assert guard.allowed(again)
    assert guard.state(again).observed == 0
    assert not any(observe(guard, *[(0.0, 9.0)] * 50))
    assert guard.state(again).observed == 0
    assert not any(observe(guard, *[BAD] * 50, policy=again))


def test_the_state_tells_what_is_judged():
    guard = DriftGuard()
    observe(guard, GOOD)
    assert guard.state(POLICY).agreement is None
    observe(guard, (0.5, 2.0), (0.9, 0.5), GOOD)
    state = guard.state(POLICY)
    assert (state.sender, state.receiver, state.drifted) == (POLICY.sender, POLICY.receiver, False)
    assert (state.samples, state.observed, state.since) == (4, 4, 4)
    assert (state.agreement, state.kl) == pytest.approx((2.9 / 3, 0.5 / 3))
    observe(guard, *[BAD] * 8)
    state = guard.state(POLICY)
    assert state.drifted
    assert state.observed == 12
    assert state.samples == state.since < 8


def test_each_change_is_logged_once(caplog):
    guard = DriftGuard()
    with caplog.at_level(logging.INFO):
        observe(guard, *[BAD] * 20, *[GOOD] * 100, *[BAD] * 100)
    said = [record.getMessage() for record in caplog.records]
    assert ["has drifted" in text for text in said] == [True, False, True]
    assert all(POLICY.sender[:12] in text and POLICY.receiver[:12] in text for text in said)


def test_threads_share_a_guard():
    guard = DriftGuard(DriftOptions(sample_rate=0.25))
    taken = []

    def ask():
        taken.extend(guard.sample(POLICY) for _ in range(1000))
        observe(guard, *[GOOD] * 1000)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 1000
    assert guard.state(POLICY).observed == 4000


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sample_rate": -0.1}, "drift sample_rate -0.1: allowed is 0 to 1"),
        ({"sample_rate": 1.5}, "drift sample_rate 1.5"),
        ({"sample_rate": math.nan}, "drift sample_rate nan"),
        ({"recovery_rate": 2}, "drift recovery_rate 2"),
        ({"least": 1}, "drift least 1: allowed is 2 to the window, 64"),
        ({"window": 4}, "drift least 8: allowed is 2 to the window, 4"),
        ({"margin": 1}, "drift margin 1"),
    ],
)
def test_options_that_are_not_allowed(wrong, says):
    with pytest.raises(ConfigError, match=says):
        DriftOptions(**wrong)


class Watch(RuleBasedStateMachine):
    """The guard against its rules, written down once more over a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.options = DriftOptions(window=6, least=3, margin=0.5)
        self.guard = DriftGuard(self.options)
        self.drifted = False
        self.window: deque[tuple[float, float]] = deque(maxlen=6)

    @rule(sample=samples | st.sampled_from([GOOD, BAD]), times=st.integers(1, 4))
    def sample(self, sample, times):
        for _ in range(times):
            self.window.append(sample)
            enough = len(self.window) >= (6 if self.drifted else 3)
            turned = enough and (self.good() if self.drifted else self.bad())
            assert self.guard.observe(POLICY, *sample) == turned
            if turned:
                self.drifted = not self.drifted
                self.window.clear()

    def means(self):
        agreements, divergences = zip(*self.window, strict=True)
        return fmean(sorted(agreements)[1:]), fmean(sorted(divergences)[:-1])

    def bad(self):
        agreement, kl = self.means()
        return agreement < 0.8 or kl > 1.0

    def good(self):
        agreement, kl = self.means()
        return agreement >= 0.9 and kl <= 0.5

    @invariant()
    def the_same_verdict(self):
        assert self.guard.allowed(POLICY) is not self.drifted
        assert self.guard.state(POLICY).samples == len(self.window)


TestWatch = Watch.TestCase
