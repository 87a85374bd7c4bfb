"""Methods: every way to fill a prefix's cache that the profiler and the benchmarks compare.

    Plan                  full prefill ("full"), full reuse ("reuse"), groups, scattered groups, maps
    ReuseOne(layer)       the receiver's own cache, one layer the sender's (sensitivity; paper, Figure 7)
    CacheBlend(ratio)     the share of tokens whose K differs most is recomputed in all layers (CacheBlend)

Only plans are served; the others are what they are measured against. Each has one text, which names it in
files and reports.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

from droidspeak.errors import UsageError
from droidspeak.layerselect.plan import Plan

__all__ = ["CacheBlend", "Method", "ReuseOne", "parse_method"]

_REUSE_ONE = re.compile(r"reuse-one:([0-9]{1,6})")
_CACHE_BLEND = re.compile(r"cacheblend:([0-9.]{1,20})")


@dataclass(frozen=True, slots=True)
class ReuseOne:
    """Reuses exactly `layer`; all others are the receiver's own. Never served: it costs a full prefill."""

    layer: int

    def __str__(self) -> str:
        return f"reuse-one:{self.layer}"


@dataclass(frozen=True, slots=True)
class CacheBlend:
    """Recomputes `ratio` of the tokens (0 .. 1) in all layers, and all tokens in the first.

    Yao et al., EuroSys'25 (arXiv 2405.16444); which tokens, the keys of layer 1 say, as in LMCache's blender.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and 0 <= self.ratio <= 1):
            raise UsageError(f"CacheBlend ratio {self.ratio}: allowed is 0 to 1")

    def layer_equivalents(self, layers: int) -> float:
        """Recomputed layers of a plan that costs as much prefill."""
        return 1 + self.ratio * (layers - 1)

    def __str__(self) -> str:
        return f"cacheblend:{self.ratio:g}"


Method: TypeAlias = Plan | ReuseOne | CacheBlend


def parse_method(text: str, layers: int) -> Method:
    """From the text of a method. Raises `UsageError`."""
    if match := _REUSE_ONE.fullmatch(text):
        return ReuseOne(int(match[1]))
    if match := _CACHE_BLEND.fullmatch(text):
        return CacheBlend(float(match[1]))
    return Plan.parse(text, layers)
