"""Measures of one answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.layerselect.metrics import (
    KL,
    METRICS,
    edit_similarity,
    exact_match,
    f1,
    get_metric,
    rouge_l,
    token_agreement,
)

MEASURES = pytest.mark.parametrize("measure", [exact_match, f1, rouge_l, edit_similarity, token_agreement])

answers = st.lists(st.integers(0, 3), max_size=8)


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "overlap", "agreement"),
    [
        ("", "", 1, 1, 1),
        ("a", "", 0, 0, 0),
        ("", "a", 0, 0, 0),
        ("abc", "abc", 1, 1, 1),
        ("abc", "cab", 0, 1, 0),
        ("ab", "abcd", 0, 2 / 3, 1 / 2),
        ("abcd", "ab", 0, 2 / 3, 1 / 2),
        ("aab", "abb", 0, 2 / 3, 2 / 3),
        ("aaaa", "a", 0, 2 / 5, 1 / 4),
        ("xy", "ab", 0, 0, 0),
    ],
)
def test_examples(answer, expected, exact, overlap, agreement):
    assert exact_match(answer, expected) == exact
    assert f1(answer, expected) == pytest.approx(overlap)
    assert token_agreement(answer, expected) == pytest.approx(agreement)


@MEASURES
def test_kinds_of_sequences_do_not_matter(measure):
    assert measure([1, 2], (1, 2)) == 1


@MEASURES
@given(answers, answers)
def test_bounds_and_symmetry(measure, one, other):
    assert 0 <= measure(one, other) <= 1
    assert measure(one, other) == measure(other, one)
    assert measure(one, one) == 1


@given(answers, answers)
def test_only_the_same_answer_agrees_in_full(one, other):
    assert (token_agreement(one, other) == 1) == (one == other) == (exact_match(one, other) == 1)
    assert (f1(one, other) == 1) == (sorted(one) == sorted(other))
    assert f1(one, other) >= token_agreement(one, other)


@given(answers, answers, st.randoms())
def test_f1_does_not_see_order(one, other, random):
    assert f1(random.sample(one, len(one)), other) == f1(one, other)


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [("a b c d", "a x c d", 3 / 4), ("a b", "b a", 1 / 2), ("a", "a b c", 1 / 2), ("", "a", 0), ("", "", 1)],
)
def test_rouge_l_is_the_longest_common_subsequence(answer, expected, value):
    assert rouge_l(answer.split(), expected.split()) == pytest.approx(value)


def test_edit_similarity_counts_characters_of_texts_and_single_ids():
    assert edit_similarity(["kitten"], ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert edit_similarity(["ab", "cd"], ["ab", "ce"]) == pytest.approx(1 - 1 / 5)
    assert edit_similarity([123, 7, 9], [123, 8, 9]) == pytest.approx(1 - 1 / 3)


def test_metrics_have_names_and_others_are_refused():
    assert get_metric("rouge-l") is rouge_l
    assert get_metric(KL) is None
    with pytest.raises(UsageError, match="allowed are exact-match, f1, rouge-l, edit-similarity, kl"):
        get_metric("bleu")
    assert KL not in METRICS
