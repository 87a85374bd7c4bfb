"""The arithmetic of profiling a fleet, against counting; and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fleet
from droidspeak.layerselect import profiler

PAGE = Path(__file__).parents[1] / "docs" / "fleet.md"

sizes = st.tuples(st.integers(1, 4), st.integers(1, 10)).map(lambda pair: (pair[0] * pair[1], pair[0]))


@given(sizes)
def test_formulas_count_what_the_profiler_does(size):
    layers, granularity = size
    groups = profiler.contiguous_groups(layers, granularity)
    assert fleet.groups(layers, granularity) == len(groups)
    assert fleet.layers_each_group(layers, granularity) == sum(len(group) for group in groups)
    starts = {group.start for group in groups}
    assert fleet.layers_by_start(layers, granularity) == sum(layers - start for start in starts)
    assert fleet.mapped_plans(layers, granularity) == len(profiler.mapped_plans(layers, groups))


def test_the_papers_figures_come_out():
    assert fleet.groups(32, 1) == 528
    assert fleet.groups(32, 2) == 136
    assert fleet.papers_hours() == pytest.approx(3, abs=0.2)


def test_the_page_shows_these_tables():
    page = PAGE.read_text()
    for title, table in fleet.tables():
        assert table in page, f"{title}: run python -m benchmarks.fleet"
