"""Measures of one answer. All lie in 0 .. 1, and 1 is best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["exact_match", "f1", "token_agreement"]


def exact_match(answer: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """1 if both are the same."""
    return float(list(answer) == list(expected))


def f1(answer: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall over the units that both hold (SQuAD, Rajpurkar 2016)."""
    common = sum((Counter(answer) & Counter(expected)).values())
    if not answer or not expected:
        return float(len(answer) == len(expected))
    return 2 * common / (len(answer) + len(expected))


def token_agreement(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Share of positions at which both hold the same token; a missing token does not agree."""
    longest = max(len(answer), len(reference))
    if longest == 0:
        return 1.0
    return sum(a == b for a, b in zip(answer, reference, strict=False)) / longest
