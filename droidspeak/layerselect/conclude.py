"""What follows from the measurements of a pair: findings, frontier, policy, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

from droidspeak.errors import UsageError
from droidspeak.layerselect.costs import fit_costs
from droidspeak.layerselect.measures import Measures, Score
from droidspeak.layerselect.methods import Method, ReuseOne
from droidspeak.layerselect.metrics import KL, get_metric
from droidspeak.layerselect.plan import Plan
from droidspeak.layerselect.policy import FrontierPoint, MapFile, Policy, Thresholds
from droidspeak.layerselect.profile import Finding, Profile, PromptSet, Work, pareto
from droidspeak.layerselect.tasks import SENDER_ALONE, Result, Unit, digest_of

__all__ = ["Evidence", "Pair", "ProfileOptions", "Scores", "Search", "conclude"]

Scores = Mapping[str, Mapping[str, Score]]
"""By the text of a method and by prompt id."""

_GOOD = 0.95
_FEW_PROMPTS = 8


class Search(StrEnum):
    """How the best group of each size is found."""

    FAST = "fast"
    FULL = "full"


@dataclass(frozen=True)
class ProfileOptions:
    """How to profile.

    Attributes:
        granularity: groups start and end at multiples of it.
        prompts: calibration prompts that the fast search uses.
        baselines: also measure sensitivity, scattered layers and CacheBlend.
        blend: CacheBlend can be measured: the models attend to no window.

    Raises:
        UsageError: a value that is not allowed, or a metric whose extra is missing.
    """

    metric: str = "exact-match"
    search: Search = Search.FAST
    granularity: int = 1
    prompts: int = 16
    baselines: bool = True
    blend: bool = True

    def __post_init__(self) -> None:
        metric = get_metric(self.metric)
        if metric is not None:
            # Now, not after hours: some metrics want an optional part.
            metric(["a"], ["a"])
        if self.granularity < 1 or self.prompts < 1:
            raise UsageError(
                f"granularity {self.granularity}, {self.prompts} prompts: allowed are positive numbers"
            )


@dataclass(frozen=True)
class Pair:
    """Source ids, and names for people."""

    sender: str
    receiver: str
    sender_name: str
    receiver_name: str
    layers: int


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured.

    Attributes:
        groups: scores of the search, on `calibration`.
        scores: of `candidates`, `singles`, `baselines`, full prefill and the sender alone, on `held_out`.
        searched: all results of the search, `kinds` kinds of maps included.
        answered: the results behind `scores`.
        maps: of the kind `map_features`, which mapped plans need.
        seconds: that all of it took.
    """

    pair: Pair
    options: ProfileOptions
    calibration: Sequence[Unit]
    held_out: Sequence[Unit]
    groups: Scores
    candidates: Sequence[Plan]
    singles: Sequence[ReuseOne]
    baselines: Sequence[Method]
    scores: Scores
    searched: Sequence[Result]
    kinds: int
    answered: Sequence[Result]
    map_features: str | None
    maps: MapFile | None
    seconds: float


def conclude(evidence: Evidence) -> Profile:
    """The profile. Raises `UsageError` if full prefill itself has no quality."""
    pair, options = evidence.pair, evidence.options
    full = Measures.of(evidence.scores["full"])
    if full.quality == 0:
        raise UsageError(
            f"the receiver's own full prefill scores 0 by {options.metric} on the held-out prompts: "
            "there is no quality to keep"
        )

    def findings(methods: Iterable[Method]) -> tuple[Finding, ...]:
        measured = ((method, Measures.of(evidence.scores[str(method)])) for method in methods)
        return tuple(Finding(method, found, found.quality / full.quality) for method, found in measured)

    candidates = findings(evidence.candidates)
    points = pareto(candidates)
    sender_alone = Measures.of(evidence.scores[SENDER_ALONE])
    return Profile(
        sender_name=pair.sender_name,
        receiver_name=pair.receiver_name,
        layers=pair.layers,
        granularity=options.granularity,
        search=options.search.value,
        metric=options.metric,
        calibration=_prompt_set(evidence.calibration),
        held_out=_prompt_set(evidence.held_out),
        full_prefill=Finding(Plan.parse("full", pair.layers), full, 1.0),
        sender_alone=sender_alone,
        sensitivity=findings(evidence.singles),
        groups=_on_calibration(evidence),
        candidates=candidates,
        baselines=findings(evidence.baselines),
        policy=_policy(evidence, points),
        work=_work(evidence),
        map_features=evidence.map_features,
        warnings=tuple(_warnings(evidence, full, sender_alone, points)),
    )


def _on_calibration(evidence: Evidence) -> tuple[Finding, ...]:
    full = fmean(score.quality for score in evidence.groups["full"].values()) or 1.0
    measured = ((text, Measures.of(rows)) for text, rows in evidence.groups.items())
    layers = evidence.pair.layers
    return tuple(Finding(Plan.parse(text, layers), found, found.quality / full) for text, found in measured)


def _policy(evidence: Evidence, points: tuple[FrontierPoint, ...]) -> Policy:
    results = [*evidence.searched, *evidence.answered]
    costs = fit_costs(
        [timing for result in results for timing in result.timings],
        [timing for result in results for timing in result.map_timings],
        median(seconds for result in results for seconds in result.suffix_seconds),
    )
    return Policy(
        evidence.pair.sender,
        evidence.pair.receiver,
        points,
        thresholds=_thresholds(points),
        costs=costs,
        maps=evidence.maps if any(point.plan.needs_maps for point in points) else None,
    )


def _thresholds(points: Sequence[FrontierPoint]) -> Thresholds:
    """Somewhat worse than what was measured of the plan that most requests will get."""
    good = [point.measures for point in points if point.quality >= _GOOD and point.measures]
    if not good:
        return Thresholds()
    return Thresholds(agreement=max(0.0, good[0].agreement - 0.15), kl=3 * good[0].kl + 0.1)


def _warnings(
    evidence: Evidence, full: Measures, sender_alone: Measures, points: Sequence[FrontierPoint]
) -> Iterator[str]:
    """What makes this profile doubtful; first of all the gate of the paper (section 3)."""
    if evidence.options.metric != KL and sender_alone.quality >= full.quality:
        yield (
            f"the sender alone scores {sender_alone.quality:.3f}, the receiver {full.quality:.3f}: the "
            "receiver is not better on these prompts, so what a plan keeps of its quality means little"
        )
    prompts = sum(len(unit.questions) for unit in evidence.calibration)
    if prompts < _FEW_PROMPTS:
        yield f"{prompts} calibration prompts: the choice of groups wants at least {_FEW_PROMPTS}"
    if not any(point.quality >= _GOOD and point.plan.loaded for point in points):
        yield f"no plan that reuses layers keeps {_GOOD:.0%} of full prefill's quality: the pair cannot share"


def _work(evidence: Evidence) -> Work:
    runs = [run for result in evidence.searched for run in result.runs]
    plans = [Plan.parse(text, evidence.pair.layers) for text in evidence.groups]
    # Mapping K and V asks for no prefill of its own.
    prefilled = {Plan.recompute(plan.layers, plan.groups, map_e=plan.map_e) for plan in plans}
    tokens = sum(len(unit.prefix) for unit in evidence.calibration)
    each_group = tokens * sum(plan.recomputed * (evidence.kinds if plan.map_e else 1) for plan in prefilled)
    return Work(len(runs), sum(layers * count for layers, count in runs), each_group, evidence.seconds)


def _prompt_set(units: Sequence[Unit]) -> PromptSet:
    ids = tuple(question.id for unit in units for question in unit.questions)
    return PromptSet(ids, digest_of(units))
