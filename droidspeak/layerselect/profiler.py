"""The profiler: which layers must a receiver recompute over a sender's cache?

    search     every contiguous group on calibration prompts, plain and with each kind of maps
               full: by the task metric, as in the paper (section 5); fast: by divergence on a few prompts
    candidates the best plan of each size, plain and for each way to map; full reuse, full prefill
    refit      the best kind of maps, on all calibration prompts
    measure    candidates, sensitivity and baselines on held-out prompts, with the task metric
    frontier   the Pareto set of the candidates -> the policy

It knows no engine: a `Runner` measures tasks, wherever the models are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from droidspeak.layerselect.conclude import Evidence, Pair, ProfileOptions, Search, conclude
from droidspeak.layerselect.measures import Score
from droidspeak.layerselect.methods import CacheBlend, Method, ReuseOne
from droidspeak.layerselect.plan import Group, Plan
from droidspeak.layerselect.policy import MapFile
from droidspeak.layerselect.profile import Profile
from droidspeak.layerselect.tasks import Result, Task, Unit, spread

__all__ = [
    "Pair",
    "ProfileOptions",
    "Profiler",
    "Search",
    "Tell",
    "contiguous_groups",
    "mapped_plans",
    "split",
]

Tell = Callable[[str, Sequence[Task]], Iterable[tuple[Task, Result]]]
"""Measures tasks under a title for people; a `Runner` behind a journal and a progress bar."""

Scores = dict[str, dict[str, Score]]


@dataclass
class _Measured:
    """What tasks gave, prompts in their order."""

    scores: Scores = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)


class Profiler:
    """Profiles one pair.

    Args:
        run: measures tasks.
        calibration: prompts for the search; none of them was used to fit maps.
        held_out: prompts for everything that is reported.
        maps: fitted maps by the name of their features; the best kind is kept.
        refit: fits that kind once more, with the prompts of the search, which have served their purpose.

    Raises:
        UsageError: no prompts, or prompts that are in both sets.
    """

    def __init__(
        self,
        pair: Pair,
        options: ProfileOptions,
        run: Tell,
        calibration: Sequence[Unit],
        held_out: Sequence[Unit],
        maps: Mapping[str, MapFile] | None = None,
        refit: Callable[[str], MapFile] | None = None,
    ) -> None:
        self._pair, self._options, self._run = pair, options, run
        limit = options.prompts if options.search is Search.FAST else len(_ids(calibration))
        self._calibration, self._held_out = spread(calibration, limit), list(held_out)
        self._maps = dict(maps or {})
        self._refit = refit or self._maps.__getitem__
        self._groups = contiguous_groups(pair.layers, options.granularity)

    def profile(self) -> Profile:
        """Measures everything and draws the conclusions. Raises `UsageError`."""
        started = time.monotonic()
        plain = self._search("groups", None, self._plain_plans())
        tried = self._tried_maps()
        # The kind whose best plans of all sizes diverge least.
        kind = min(tried, key=lambda name: self._divergence(tried[name].scores), default=None)
        groups = {**plain.scores, **(tried[kind].scores if kind else {})}
        candidates = self._best(groups)
        singles, scattered = self._scattered()
        blends = self._blends()
        maps = self._refit(kind) if kind else None
        held_out = self._measure(
            "held-out prompts",
            self._held_out,
            [*candidates, *singles, *scattered, *blends],
            maps=maps,
            sender_alone=True,
        )
        evidence = Evidence(
            pair=self._pair,
            options=self._options,
            calibration=self._calibration,
            held_out=self._held_out,
            groups=groups,
            candidates=candidates,
            singles=singles,
            baselines=[Plan.parse("reuse", self._pair.layers), *scattered, *blends],
            scores=held_out.scores,
            searched=[*plain.results, *(result for one in tried.values() for result in one.results)],
            kinds=len(tried),
            answered=held_out.results,
            map_features=kind,
            maps=maps,
            seconds=time.monotonic() - started,
        )
        return conclude(evidence)

    # --- search ---

    def _plain_plans(self) -> list[Plan]:
        layers = self._pair.layers
        return [Plan.recompute(layers, ()), *(Plan.recompute(layers, [group]) for group in self._groups)]

    def _search(self, title: str, maps: MapFile | None, plans: Sequence[Plan]) -> _Measured:
        generate = self._options.search is Search.FULL
        return self._measure(title, self._calibration, plans, maps=maps, generate=generate)

    def _tried_maps(self) -> dict[str, _Measured]:
        """The mapped plans with each kind of maps."""
        plans = mapped_plans(self._pair.layers, self._groups)
        return {kind: self._search(f"groups, {kind} maps", file, plans) for kind, file in self._maps.items()}

    def _divergence(self, scores: Scores) -> float:
        """Mean over sizes of the least divergence."""
        least: dict[int, float] = {}
        for plan in self._best(scores):
            least[plan.recomputed] = min(_mean_kl(scores[str(plan)]), least.get(plan.recomputed, math.inf))
        return fmean(least.values())

    def _best(self, scores: Scores) -> list[Plan]:
        """The best plan of each number of recomputed layers and each way to map, by ascending layers."""
        best: dict[tuple[int, bool, int], tuple[tuple[float, float], Plan]] = {}
        for text, rows in scores.items():
            plan, rank = Plan.parse(text, self._pair.layers), self._rank(rows)
            key = plan.recomputed, plan.map_e, _share_mapped(plan)
            if key not in best or rank < best[key][0]:
                best[key] = rank, plan
        return [best[key][1] for key in sorted(best)]

    def _rank(self, rows: Mapping[str, Score]) -> tuple[float, float]:
        quality = fmean(score.quality for score in rows.values())
        return (-quality if self._options.search is Search.FULL else 0.0, _mean_kl(rows))

    # --- baselines ---

    def _scattered(self) -> tuple[list[ReuseOne], list[Plan]]:
        """Every layer alone, and plans of the most sensitive layers wherever they are (paper, Figure 10)."""
        if not self._options.baselines:
            return [], []
        singles = [ReuseOne(layer) for layer in range(self._pair.layers)]
        scores = self._measure("sensitivity", self._calibration, singles, generate=False).scores
        order = sorted(singles, key=lambda single: -_mean_kl(scores[str(single)]))
        plans = [
            Plan.recompute(self._pair.layers, [Group(one.layer, one.layer) for one in order[:size]])
            for size in self._baseline_sizes()
        ]
        return singles, plans

    def _blends(self) -> list[CacheBlend]:
        """CacheBlend at the prefill work of each plan up to half of the layers."""
        if not (self._options.baselines and self._options.blend and self._pair.layers > 1):
            return []
        return [CacheBlend((size - 1) / (self._pair.layers - 1)) for size in self._baseline_sizes()]

    def _baseline_sizes(self) -> list[int]:
        sizes = {len(group) for group in self._groups if 2 * len(group) <= self._pair.layers}
        return sorted(sizes)

    # --- measuring ---

    def _measure(
        self,
        title: str,
        units: Sequence[Unit],
        methods: Sequence[Method],
        *,
        maps: MapFile | None = None,
        generate: bool = True,
        sender_alone: bool = False,
    ) -> _Measured:
        names = tuple(dict.fromkeys(map(str, methods)))
        tasks = [Task(unit, names, maps, generate, sender_alone) for unit in units]
        done = dict(self._run(title, tasks))
        measured = _Measured(results=[done[task] for task in tasks])
        for result in measured.results:
            for name, rows in result.scores.items():
                measured.scores.setdefault(name, {}).update(rows)
        return measured


def split(units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Prefixes to fit maps on, and prefixes to choose plans by: none in both."""
    return list(units[::2]), list(units[1::2])


def contiguous_groups(layers: int, granularity: int) -> list[Group]:
    """Every contiguous group that starts and ends at a multiple of `granularity`, or at the last layer.

    528 of 32 layers at granularity 1, 136 at granularity 2 (paper, section 5).
    """
    bounds = [*range(0, layers, granularity), layers]
    return [Group(start, end - 1) for n, start in enumerate(bounds) for end in bounds[n + 1 :]]


def mapped_plans(layers: int, groups: Collection[Group]) -> list[Plan]:
    """For each group: E mapped, and K and V mapped nowhere, before the group, or wherever they are loaded."""
    everywhere = range(layers)
    plans = [Plan.recompute(layers, (), mapped=everywhere)]
    for group in groups:
        for mapped in ((), range(group.start), everywhere):
            plan = Plan.recompute(layers, [group], map_e=True, mapped=mapped)
            if plan.needs_maps:
                plans.append(plan)
    return list(dict.fromkeys(plans))


def _share_mapped(plan: Plan) -> int:
    """0 if no loaded layer is mapped, 2 if all are, else 1."""
    return 0 if not plan.mapped else 1 + (plan.mapped == plan.loaded)


def _mean_kl(rows: Mapping[str, Score]) -> float:
    return math.fsum(score.kl for score in rows.values()) / len(rows)


def _ids(units: Sequence[Unit]) -> list[str]:
    return [question.id for unit in units for question in unit.questions]
