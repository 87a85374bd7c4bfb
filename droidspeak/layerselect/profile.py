"""A profile: everything that was measured of one ordered pair. Its policy is what serving needs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from droidspeak.layerselect.measures import Measures
from droidspeak.layerselect.methods import Method
from droidspeak.layerselect.plan import Plan
from droidspeak.layerselect.policy import FrontierPoint, Policy

__all__ = ["Finding", "Profile", "PromptSet", "Work", "pareto"]


@dataclass(frozen=True)
class Finding:
    """One method on one prompt set.

    Attributes:
        share: quality as a share of full prefill's on the same prompts; may exceed 1.
    """

    method: Method
    measures: Measures
    share: float

    @property
    def recomputed(self) -> int | None:
        """Recomputed layers; `None` for what is no plan."""
        return self.method.recomputed if isinstance(self.method, Plan) else None


@dataclass(frozen=True)
class PromptSet:
    """Which prompts: their ids, and a digest of their content."""

    ids: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Work:
    """Prefill work of choosing the groups, in layer-tokens: one token through one layer.

    Attributes:
        partial_prefills: recompute runs that were done.
        layer_tokens: of those runs.
        each_group: what one run per group takes for the same prompts (the paper's way).
        seconds: time that the whole profile took.
    """

    partial_prefills: int
    layer_tokens: int
    each_group: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Of one ordered pair.

    Attributes:
        sender_name, receiver_name: for people; identity is in `policy`.
        search: `full` (task metric on all prompts) or `fast` (divergence on a few).
        metric: the task metric's name.
        full_prefill: the receiver's own full prefill, held-out prompts.
        sender_alone: the sender's own full prefill on the same prompts.
        sensitivity: `ReuseOne` of every layer, held-out (paper, Figure 7).
        groups: every contiguous group on calibration prompts, plain and mapped (paper, Figure 11).
        candidates: the best plan of each size by `groups`, held-out.
        baselines: full reuse, scattered layers, CacheBlend, held-out.
        policy: with the frontier, which is the Pareto set of `candidates`.
        warnings: what makes the profile doubtful, a line each.
        provenance: versions, date, machine, options.
    """

    sender_name: str
    receiver_name: str
    layers: int
    granularity: int
    search: str
    metric: str
    calibration: PromptSet
    held_out: PromptSet
    full_prefill: Finding
    sender_alone: Measures
    sensitivity: tuple[Finding, ...]
    groups: tuple[Finding, ...]
    candidates: tuple[Finding, ...]
    baselines: tuple[Finding, ...]
    policy: Policy
    work: Work
    map_features: str | None = None
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def pareto(findings: Sequence[Finding]) -> tuple[FrontierPoint, ...]:
    """The plans that no other plan beats, by ascending recomputed layers, then mapped ones.

    A plan beats another with no more recomputed layers, no more maps and no less quality; where all three are
    the same, with less divergence. Maps count because applying one takes time too, if less than a layer.
    """
    ranked = {
        finding.method: (*_cost(finding.method), -finding.share, finding.measures.kl, str(finding.method))
        for finding in findings
        if isinstance(finding.method, Plan)
    }
    shares = {finding.method: finding for finding in findings}
    kept = [plan for plan in ranked if not any(_beats(ranked[other], ranked[plan]) for other in ranked)]
    return tuple(
        FrontierPoint(plan, shares[plan].share, shares[plan].measures)
        for plan in sorted(kept, key=ranked.__getitem__)
    )


_Rank = tuple[int, int, float, float, str]


def _cost(plan: Plan) -> tuple[int, int]:
    return plan.recomputed, plan.maps


def _beats(one: _Rank, other: _Rank) -> bool:
    if one[:3] == other[:3]:
        return one < other
    return all(a <= b for a, b in zip(one[:3], other[:3], strict=True))
