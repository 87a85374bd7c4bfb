"""The prefill-time model finds the times that made it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.layerselect.costs import fit_costs
from droidspeak.layerselect.tasks import Timing


@given(st.floats(1e-7, 1e-3), st.floats(1e-10, 1e-6))
def test_times_that_follow_the_model_are_found_again(linear, square):
    timings = [
        Timing(layers, tokens, layers * (linear * tokens + square * tokens**2))
        for layers in (1, 4, 7)
        for tokens in (100, 800, 3000)
    ]
    costs = fit_costs(timings, [], 0.02)
    for timing in timings:
        predicted = timing.layers * (
            costs.per_token * timing.tokens + costs.per_token_pair * timing.tokens**2
        )
        assert predicted == pytest.approx(timing.seconds, rel=1e-3)
    assert costs.suffix == 0.02


def test_one_length_gives_a_line():
    costs = fit_costs(
        [Timing(2, 100, 2.0), Timing(1, 100, 1.0), Timing(1, 100, 9.0)], [Timing(1, 10, 0.1)], 0
    )
    assert (costs.per_token, costs.per_token_pair) == (pytest.approx(0.01), 0)
    assert costs.per_mapped_token == pytest.approx(0.01)


@given(st.lists(st.builds(Timing, st.integers(1, 9), st.integers(1, 999), st.floats(0, 9)), min_size=1))
def test_no_times_make_a_cost_below_nothing(timings):
    costs = fit_costs(timings, [], 0)
    assert costs.per_token >= 0
    assert costs.per_token_pair >= 0


def test_nothing_timed_is_nothing_known():
    assert fit_costs([], [], 0.1) is None
