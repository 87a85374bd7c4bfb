"""What is measured of a method: a score per prompt, and their summary.

Means hide harm: a mapped cache with a mean task score of 0.977 was safe on 13.9 % of prompts (CacheBridge).
So a summary also names the worst prompt, and keeps the agreement with the receiver's own tokens.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Measures", "Score", "confidence"]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Score:
    """One prompt under one method.

    Attributes:
        quality: task metric of the answer, 0 .. 1.
        kl: divergence of the answer tokens' logits from those of full prefill, mean in nats.
        agreement: share of the answer tokens at which both say the same token.
    """

    quality: float
    kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Measures:
    """Summary over prompts.

    Attributes:
        low, high: 95 % confidence interval of `quality` (bootstrap over prompts).
        worst_prompt: id of the prompt with the lowest quality; among equals with the greatest divergence.
        worst: its score.
    """

    prompts: int
    quality: float
    low: float
    high: float
    kl: float
    agreement: float
    worst_prompt: str
    worst: Score

    @classmethod
    def of(cls, scores: Mapping[str, Score]) -> Measures:
        """Of at least one score, by prompt id."""
        worst = min(scores, key=lambda name: (scores[name].quality, -scores[name].kl, name))
        qualities = [score.quality for score in scores.values()]
        low, high = confidence(qualities)
        return cls(
            prompts=len(scores),
            quality=statistics.fmean(qualities),
            low=low,
            high=high,
            kl=statistics.fmean(score.kl for score in scores.values()),
            agreement=statistics.fmean(score.agreement for score in scores.values()),
            worst_prompt=worst,
            worst=scores[worst],
        )


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`; the same for the same values."""
    source = random.Random(0)
    means = sorted(statistics.fmean(source.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]
