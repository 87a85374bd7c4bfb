"""The prefill-time model, fitted to what was timed while profiling (paper, Appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from droidspeak.layerselect.policy import Costs
from droidspeak.layerselect.tasks import Timing

__all__ = ["fit_costs"]


def fit_costs(timings: Sequence[Timing], map_timings: Sequence[Timing], suffix: float) -> Costs | None:
    """Costs of one layer by tokens, `None` if no recompute was timed.

    Least squares of `a n + b n^2` per layer, with neither below 0.

    Args:
        suffix: seconds that the new tokens take.
    """
    if not timings:
        return None
    tokens = np.array([timing.tokens for timing in timings], dtype=float)
    seconds = np.array([timing.seconds / timing.layers for timing in timings])
    linear, square = np.linalg.lstsq(np.stack([tokens, tokens**2], axis=1), seconds, rcond=None)[0]
    if square < 0 or len(set(tokens)) < 2:
        linear, square = np.median(seconds / tokens), 0.0
    elif linear < 0:
        linear, square = 0.0, np.median(seconds / tokens**2)
    mapped = median([timing.seconds / timing.layers / timing.tokens for timing in map_timings] or [0.0])
    return Costs(float(linear), float(square), mapped, suffix)
