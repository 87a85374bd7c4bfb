"""Measures of one answer. All lie in 0 .. 1, and 1 is best.

What is compared are units: the words of a text, or token ids where there is no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import ModuleType
from typing import TypeAlias

from droidspeak.errors import MissingExtra, UsageError

__all__ = [
    "KL",
    "METRICS",
    "Metric",
    "edit_similarity",
    "exact_match",
    "f1",
    "get_metric",
    "rouge_l",
    "token_agreement",
]

Units: TypeAlias = Sequence[Hashable]
Metric: TypeAlias = Callable[[Units, Units], float]


def exact_match(answer: Units, expected: Units) -> float:
    """1 if both are the same."""
    return float(list(answer) == list(expected))


def f1(answer: Units, expected: Units) -> float:
    """Harmonic mean of precision and recall over the units that both hold (SQuAD, Rajpurkar 2016)."""
    common = sum((Counter(answer) & Counter(expected)).values())
    if not answer or not expected:
        return float(len(answer) == len(expected))
    return 2 * common / (len(answer) + len(expected))


def rouge_l(answer: Units, expected: Units) -> float:
    """F-measure of the longest common subsequence of units (ROUGE-L, Lin 2004)."""
    if not answer or not expected:
        return float(len(answer) == len(expected))
    common = _distances("ROUGE-L").LCSseq.similarity(list(answer), list(expected))
    return float(2 * common / (len(answer) + len(expected)))


def edit_similarity(answer: Units, expected: Units) -> float:
    """1 less the edit distance over the longer length (Levenshtein), as LongBench scores code.

    Texts are compared by character, their words joined by blanks; token ids by id.
    """
    distance = _distances("edit similarity").Levenshtein
    return float(distance.normalized_similarity(_comparable(answer), _comparable(expected)))


def _comparable(units: Units) -> Units:
    words = [unit for unit in units if isinstance(unit, str)]
    return " ".join(words) if len(words) == len(units) else list(units)


def token_agreement(answer: Units, reference: Units) -> float:
    """Share of positions at which both hold the same token; a missing token does not agree."""
    longest = max(len(answer), len(reference))
    if longest == 0:
        return 1.0
    return sum(a == b for a, b in zip(answer, reference, strict=False)) / longest


KL = "kl"
"""The metric that needs no right answer: exp(-KL) of the answer tokens from full prefill's."""

METRICS: Mapping[str, Metric] = {
    "exact-match": exact_match,
    "f1": f1,
    "rouge-l": rouge_l,
    "edit-similarity": edit_similarity,
}


def get_metric(name: str) -> Metric | None:
    """The metric of that name, `None` for `KL`. Raises `UsageError`."""
    if name == KL:
        return None
    if name not in METRICS:
        raise UsageError(f"metric {name!r}: allowed are {', '.join([*METRICS, KL])}")
    return METRICS[name]


def _distances(what: str) -> ModuleType:
    try:
        from rapidfuzz import distance
    except ImportError:
        raise MissingExtra(what, "profile") from None
    return distance
