"""Methods and their texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.layerselect import CacheBlend, Plan, ReuseOne
from droidspeak.layerselect.methods import parse_method


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("reuse-one:3", ReuseOne(3)),
        ("cacheblend:0.25", CacheBlend(0.25)),
        ("cacheblend:0", CacheBlend(0.0)),
        ("full", Plan.parse("full", 6)),
        ("reuse", Plan.parse("reuse", 6)),
        ("1-2+emap+kvmap:0", Plan.parse("1-2+emap+kvmap:0", 6)),
    ],
)
def test_text_round_trip(text, method):
    assert parse_method(text, 6) == method
    assert str(method) == text


@given(st.integers(0, 31), st.integers(0, 1000))
def test_texts_of_baselines_name_them(layer, thousandths):
    for method in (ReuseOne(layer), CacheBlend(thousandths / 1000)):
        assert parse_method(str(method), 32) == method


@pytest.mark.parametrize(
    "text", ["cacheblend:1.5", "cacheblend:-1", "cacheblend:nan", "cacheblend:", "reuse-one:", "reuse-one:-1"]
)
def test_bad_methods_are_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse_method(text, 6)
    assert "\n" not in str(caught.value)


def test_a_ratio_is_a_share():
    with pytest.raises(UsageError, match="0 to 1"):
        CacheBlend(float("nan"))


def test_cacheblend_costs_the_first_layer_and_its_share_of_the_others():
    assert CacheBlend(0).layer_equivalents(12) == 1
    assert CacheBlend(1).layer_equivalents(12) == 12
    assert CacheBlend(3 / 11).layer_equivalents(12) == pytest.approx(4)
