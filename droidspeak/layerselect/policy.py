"""A policy: the frontier of plans of one ordered pair, and what goes with it.

Pairs are named by their source ids, which stand for weights, architecture, tokenizer and adapter. A
policy made for other weights has other ids and simply does not apply.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from droidspeak.errors import UsageError
from droidspeak.layerselect.measures import Measures
from droidspeak.layerselect.plan import Plan

__all__ = ["Costs", "FrontierPoint", "MapFile", "Policy", "Thresholds"]

_SOURCE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FrontierPoint:
    """A plan and the quality measured with it, 1.0 being the receiver's own full prefill.

    Attributes:
        measures: what was measured on the held-out prompts; `None` where nobody measured.
    """

    plan: Plan
    quality: float
    measures: Measures | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.quality):
            raise UsageError(f"quality {self.quality} of plan {self.plan}: allowed are finite numbers")


@dataclass(frozen=True)
class Thresholds:
    """Below these the pair has drifted from what was profiled (see `droidspeak.layerselect.drift`).

    Attributes:
        agreement: least token agreement, 0 .. 1.
        kl: greatest mean divergence, nats.
    """

    agreement: float = 0.8
    kl: float = 1.0


@dataclass(frozen=True)
class Costs:
    """Prefill time as fitted while profiling (paper, Appendix B), seconds.

    Recomputing one layer of `n` tokens takes `per_token * n + per_token_pair * n * n`; `suffix` is what the
    new tokens took, and `per_mapped_token` what mapping K and V of one layer took for one token.
    """

    per_token: float
    per_token_pair: float = 0.0
    per_mapped_token: float = 0.0
    suffix: float = 0.0


@dataclass(frozen=True)
class MapFile:
    """The fitted maps of a pair: a safetensors file, and the SHA-256 of its bytes in hex."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Policy:
    """Plans for caches of `sender` used by `receiver` (source ids, in this order).

    Attributes:
        thresholds: when the pair counts as drifted.
        costs: of prefill on the machine that profiled; `None` if nobody measured.
        codec: lossy codec that the plans were profiled with; `None` for lossless ones.
        maps: needed by plans that map.

    Raises:
        UsageError: no plans, plans of different numbers of layers, or ids that are none or the same.
    """

    sender: str
    receiver: str
    frontier: tuple[FrontierPoint, ...]
    thresholds: Thresholds = Thresholds()
    costs: Costs | None = None
    codec: str | None = None
    maps: MapFile | None = None

    def __post_init__(self) -> None:
        if not self.frontier or len({point.plan.layers for point in self.frontier}) != 1:
            raise UsageError("a policy needs at least one plan, and all plans of one number of layers")
        if self.sender == self.receiver:
            raise UsageError("a policy is for two different models: one model's own cache is exact")
        for name in (self.sender, self.receiver):
            if not _SOURCE_ID.fullmatch(name):
                raise UsageError(f"source id {name!r}: allowed are 64 hex digits, `SourceManifest.source_id`")
        if self.maps is None and any(point.plan.needs_maps for point in self.frontier):
            raise UsageError("a plan of this policy maps layers, and the policy has no maps")

    @classmethod
    def fixed(cls, sender: str, receiver: str, plan: Plan) -> Policy:
        """One plan, whose quality the caller vouches for."""
        return cls(sender, receiver, (FrontierPoint(plan, 1.0),))

    @property
    def layers(self) -> int:
        """Layers of both models."""
        return self.frontier[0].plan.layers

    @property
    def transition_layers(self) -> frozenset[int]:
        """Layers whose E the sender must store."""
        return frozenset(layer for point in self.frontier for layer in point.plan.transition_layers)

    def reaches(self, floor: float) -> bool:
        """Whether a plan that loads anything has at least the quality `floor`.

        A plan that loads nothing is the receiver's own prefill, which is exact and can be saved.
        """
        return any(point.quality >= floor and point.plan.loaded for point in self.frontier)

    def without_maps(self) -> Policy | None:
        """This policy for an engine that cannot map: less the plans that do; `None` if all do."""
        points = tuple(point for point in self.frontier if not point.plan.needs_maps)
        return replace(self, frontier=points, maps=None) if points else None
