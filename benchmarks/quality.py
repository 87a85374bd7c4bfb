"""Quality: every ordered pair of lab models x plans, maps and baselines, on held-out prompts.

`python -m benchmarks.quality [SENDER:RECEIVER ...]` prints the tables and, for all pairs, writes
`docs/benchmarks/quality.md`. Results are kept in `build/quality` until then: interrupted, it goes on.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks import equal_work
from benchmarks.measure import machine, table
from droidspeak.integrations.transformers.evaluate import Bench
from droidspeak.integrations.transformers.profiling import PairJob
from droidspeak.layerselect import CacheBlend, Plan
from droidspeak.layerselect.mapfeatures import MapFeatures
from droidspeak.layerselect.profile import Finding, Profile
from droidspeak.layerselect.profiler import ProfileOptions, Search
from droidspeak.layerselect.tasks import Result, Task
from lab.train import LAB, NAMES

_REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "quality.md"
_KEPT = Path(__file__).parents[1] / "build" / "quality"
_PAIRS = tuple((sender, receiver) for receiver in NAMES for sender in NAMES if sender != receiver)
_NEAR = 0.99
_FAILS = 0.9
_LOSS = 0.01


@dataclass(frozen=True)
class PairFindings:
    """One pair: profiled as the command does by default, and by the full search without maps."""

    name: str
    fast: Profile
    full: Profile

    @property
    def reuse(self) -> Finding:
        return _by_method(self.fast.baselines)["reuse"]

    @property
    def hard(self) -> bool:
        """Full reuse loses more than a tenth."""
        return self.reuse.share < _FAILS

    def best(self, *, mapped: bool, profile: Profile | None = None) -> dict[int, Finding]:
        """The best chosen plan of each number of recomputed layers, held-out."""
        best: dict[int, Finding] = {}
        for finding in (profile or self.fast).candidates:
            plan = finding.method
            if isinstance(plan, Plan) and plan.needs_maps == mapped:
                known = best.get(plan.recomputed)
                if known is None or finding.measures.quality > known.measures.quality:
                    best[plan.recomputed] = finding
        return best

    def enough(self, *, mapped: bool) -> Finding:
        """The plan with the fewest recomputed layers within 1 % of full prefill.

        With maps, a plain plan that is as small counts too: maps are an offer.
        """
        offers: list[tuple[int, Finding]] = [*self.best(mapped=False).items()]
        if mapped:
            offers += self.best(mapped=True).items()
        near = {size: found for size, found in reversed(offers) if found.share >= _NEAR}
        return near[min(near)]


def findings(sender: str, receiver: str) -> PairFindings:
    """Profiles one pair twice."""
    name = f"{sender} -> {receiver}"
    profiles = []
    for search, kinds in ((Search.FAST, tuple(MapFeatures)), (Search.FULL, ())):
        options = ProfileOptions(search=search, baselines=search is Search.FAST)
        prompts = LAB / "prompts"
        job = PairJob(
            LAB / "models" / sender,
            LAB / "models" / receiver,
            prompts / f"{receiver}.calibration.jsonl",
            prompts / f"{receiver}.jsonl",
            options,
            kinds,
            max_new_tokens=8,
        )
        job.check()
        profiles.append(_profile(job, _KEPT / f"{sender}-{receiver}-{search}"))
    return PairFindings(name, *profiles)


def _profile(job: PairJob, kept: Path) -> Profile:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bench: list[Bench] = []

    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        # Only if something is left to measure.
        if not bench:
            bench.append(Bench(job.spec))
        yield from ((task, bench[0].run(task)) for task in tasks)

    return job.profile(job.journal(kept), run, lambda *_: None)


def _by_method(found: Sequence[Finding]) -> dict[str, Finding]:
    return {str(finding.method): finding for finding in found}


# --- tables ---


def summary(pairs: Sequence[PairFindings]) -> str:
    """How many layers each pair needs, without and with maps."""
    rows = []
    for pair in pairs:
        plain, mapped = pair.enough(mapped=False), pair.enough(mapped=True)
        fewer = "" if not plain.recomputed else f"{(mapped.recomputed or 0) / plain.recomputed:.2f}"
        rows.append(
            [
                pair.name,
                f"{pair.fast.full_prefill.measures.quality:.3f}",
                f"{pair.fast.sender_alone.quality:.3f}",
                _interval(pair.reuse),
                f"{plain.recomputed}: {plain.method}",
                f"{plain.share:.3f}",
                f"{mapped.recomputed}: {mapped.method}",
                f"{mapped.share:.3f}",
                fewer,
                str(pair.fast.map_features),
            ]
        )
    columns = [
        "sender -> receiver",
        "full prefill",
        "sender alone",
        "full reuse",
        "plain plan within 1 %",
        "of full",
        "with maps",
        "of full",
        "layers, maps / plain",
        "features",
    ]
    ratios = [float(row[8]) for row in rows if row[8]]
    needed = f"Of {len(ratios)} pairs that need any layer, maps need at most 0.7 x the layers on "
    needed += f"{sum(ratio <= 0.7 for ratio in ratios)}; median ratio {median(ratios):.2f}." if ratios else ""
    return f"## Layers that are needed\n\n{table(columns, rows)}\n\n{needed}"


def methods(pairs: Sequence[PairFindings]) -> str:
    """Plans and baselines at equal prefill work, pairs on which full reuse fails."""
    rows = []
    for pair in (pair for pair in pairs if pair.hard):
        plain, mapped = pair.best(mapped=False), pair.best(mapped=True)
        for size, blend in enumerate(_blends(pair), 1):
            scattered = _scattered(pair, size)
            rows.append(
                [
                    pair.name if size == 1 else "",
                    str(size),
                    _named(plain[size]),
                    _named(mapped[size]),
                    _named(scattered) if scattered else "",
                    f"{_interval(blend)} {str(blend.method).removeprefix('cacheblend:')[:5]}",
                ]
            )
    columns = [
        "pair",
        "layers' work",
        "group",
        "group with maps",
        "most sensitive layers",
        "CacheBlend, share of tokens",
    ]
    lost = _lost_to_blend(pairs)
    verdict = (
        f"At equal prefill work the better of the two groups is ahead of CacheBlend on all {lost[1]} pairs."
        if not lost[0]
        else f"Behind CacheBlend at some work: {', '.join(lost[0])}."
    )
    return f"## Methods at equal prefill work\n\n{table(columns, rows)}\n\n{verdict}"


def _lost_to_blend(pairs: Sequence[PairFindings]) -> tuple[list[str], int]:
    """Hard pairs and sizes at which CacheBlend is ahead, and how many pairs are hard."""
    behind = []
    for pair in (pair for pair in pairs if pair.hard):
        plain, mapped = pair.best(mapped=False), pair.best(mapped=True)
        for size, blend in enumerate(_blends(pair), 1):
            ours = max(plain[size].measures.quality, mapped[size].measures.quality)
            if blend.measures.quality > ours:
                behind.append(f"{pair.name} at {size} ({ours:.3f} against {blend.measures.quality:.3f})")
    return behind, sum(pair.hard for pair in pairs)


def searches(pairs: Sequence[PairFindings]) -> str:
    """What the fast search loses against the full one, and what a run per start saves."""
    rows, above = [], 0
    for pair in pairs:
        fast, full = pair.best(mapped=False), pair.best(mapped=False, profile=pair.full)
        losses = [full[size].measures.quality - fast[size].measures.quality for size in sorted(full)]
        plain, mapped = pair.full.work, pair.fast.work
        above += sum(loss > _LOSS for loss in losses)
        rows.append(
            [
                pair.name,
                f"{fmean(losses):+.4f}",
                f"{max(losses):+.3f}",
                f"{len(pair.fast.calibration.ids)} / {len(pair.full.calibration.ids)}",
                f"{plain.each_group / plain.layer_tokens:.1f}x",
                f"{mapped.each_group / mapped.layer_tokens:.1f}x",
            ]
        )
    columns = [
        "pair",
        "mean loss",
        "largest loss",
        "prompts, fast / full",
        "less prefill than a run per group",
        "with three kinds of maps",
    ]
    losses = [float(row[1]) for row in rows]
    return (
        "## Fast search against full search\n\nQuality lost on held-out prompts, over the best plain group "
        f"of each size.\n\n{table(columns, rows)}\n\nMean over all pairs and sizes {fmean(losses):+.4f}; "
        f"largest mean of a pair {max(losses):+.4f}. A single size loses more than {_LOSS} {above} times."
    )


def sensitivity(pairs: Sequence[PairFindings]) -> str:
    """Quality with exactly one layer of the sender's (paper, Figure 7)."""
    layers = pairs[0].fast.layers
    rows = [
        [pair.name, *(f"{found.measures.quality:.2f}" for found in pair.fast.sensitivity)] for pair in pairs
    ]
    return "## One layer reused, all others the receiver's own\n\n" + table(
        ["pair", *map(str, range(layers))], rows
    )


def _blends(pair: PairFindings) -> list[Finding]:
    return [found for found in pair.fast.baselines if isinstance(found.method, CacheBlend)]


def _scattered(pair: PairFindings, size: int) -> Finding | None:
    return next((found for found in pair.fast.baselines if found.recomputed == size), None)


def _named(finding: Finding) -> str:
    return f"{_interval(finding)} {finding.method}"


def _interval(finding: Finding) -> str:
    measures = finding.measures
    return f"{measures.quality:.3f} ({measures.low:.2f}-{measures.high:.2f})"


def main(names: Sequence[str]) -> None:
    """Profiles the named pairs, all by default."""
    wanted = [tuple(name.split(":")) for name in names] or _PAIRS
    if unknown := set(wanted) - set(_PAIRS):
        sys.exit(f"unknown pair {unknown}; allowed: {' '.join(':'.join(pair) for pair in _PAIRS)}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        pairs = list(pool.map(findings, *zip(*wanted, strict=True)))
    sections = [summary(pairs), methods(pairs), searches(pairs), sensitivity(pairs), equal_work.run()]
    today = datetime.datetime.now(tz=datetime.UTC).date()
    prompts = pairs[0].fast.full_prefill.measures.prompts
    head = (
        f"# Quality\n\nMade by `make bench-quality` on {today}: {machine()}. "
        f"Models of the lab, bfloat16, {pairs[0].fast.layers} layers; "
        f"exact match on {prompts} held-out prompts of each receiver, in brackets the 95 % bootstrap "
        "interval over prompts. Plans were chosen by divergence on 16 calibration prompts of 4 prefixes, "
        "with maps fitted on 4 others; the maps that are measured were fitted on all 8. Of the ways to map "
        "(E alone, K and V before the group, or everywhere) each size shows the best.\n"
    )
    text = "\n".join([head, *(section + "\n" for section in sections)])
    print(text, flush=True)
    if not names:
        _REPORT.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
