"""Profiles made by hand: plausible figures for a pair whose layers 1 and 2 are critical."""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path

from droidspeak.layerselect import CacheBlend, Costs, Group, MapFile, Measures, Plan, Policy, ReuseOne, Score
from droidspeak.layerselect.profile import Finding, Profile, PromptSet, Work, pareto
from droidspeak.layerselect.profiler import contiguous_groups, mapped_plans

PROMPTS = 24


def made_profile(
    layers=12,
    *,
    names=("coder", "base"),
    search="fast",
    maps=True,
    baselines=True,
    warnings=(),
    prompt="record-{}",
    granularity=1,
    harm=1.0,
    last=0.0,
):
    """`harm` scales how much every reused layer costs, and `last` is what the last one costs."""
    source = random.Random(layers)
    weights = [harm * (1.6 if layer in (1, 2) else 0.05 + 0.03 * source.random()) for layer in range(layers)]
    weights[-1] = last

    @cache
    def measured(method):
        return _finding(method, _divergence(method, weights), source, prompt)

    groups = contiguous_groups(layers, granularity)
    plans = [Plan.parse("reuse", layers), *(Plan.recompute(layers, [group]) for group in groups)]
    mapped = mapped_plans(layers, groups) if maps else []
    found = [measured(plan) for plan in (*plans, *mapped)]
    best = [*_best(found, needs_maps=False), *_best(found, needs_maps=True)]
    sizes = range(1, layers // 2 + 1) if baselines else ()
    order = sorted(range(layers), key=lambda layer: -weights[layer])
    scattered = [Plan.recompute(layers, [Group(one, one) for one in order[:size]]) for size in sizes]
    blends = [CacheBlend((size - 1) / (layers - 1)) for size in sizes]
    policy = Policy(
        "a" * 64,
        "b" * 64,
        pareto(best),
        costs=Costs(2e-6, 1e-10, 1e-7, 0.004),
        maps=MapFile(Path("policy.maps.safetensors"), "c" * 64) if maps else None,
    )
    return Profile(
        *names,
        layers=layers,
        granularity=granularity,
        search=search,
        metric="exact-match",
        calibration=PromptSet(tuple(f"c-{n}" for n in range(16)), "d" * 64),
        held_out=PromptSet(tuple(prompt.format(n) for n in range(PROMPTS)), "e" * 64),
        full_prefill=measured(Plan.parse("full", layers)),
        sender_alone=_finding(None, 1.2, source, prompt).measures,
        sensitivity=tuple(measured(ReuseOne(layer)) for layer in range(layers)) if baselines else (),
        groups=tuple(found),
        candidates=tuple(best),
        baselines=(measured(Plan.parse("reuse", layers)), *map(measured, [*scattered, *blends])),
        policy=policy,
        work=Work(
            layers * 4, 4_000 * layers * (layers + 1) // 2, 4_000 * layers**2 * (layers + 1) // 6, 83.2
        ),
        map_features="kv+e" if maps else None,
        warnings=warnings,
        provenance={
            "created": "2026-01-05T10:00:00+00:00",
            "versions": {"droidspeak": "0.1.0", "torch": "2.13.0"},
            "machine": {"processor": "AMD EPYC", "cores": 2},
            "workers": 2,
            "ray": False,
        },
    )


def _divergence(method, weights):
    if isinstance(method, ReuseOne):
        return weights[method.layer]
    if isinstance(method, CacheBlend):
        return sum(weights) * (1 - method.ratio) ** 1.5
    reused = sum(weights[layer] * (0.25 if layer in method.mapped else 1) for layer in method.loaded)
    transition = sum(sum(weights[:layer]) for layer in method.transition_layers)
    return reused + transition * (0.08 if method.map_e else 0.4)


def _finding(method, divergence, source, prompt):
    chance = math.exp(-1.1 * divergence)
    scores = {
        prompt.format(n): Score(
            quality=float(source.random() < chance),
            kl=divergence * (0.7 + 0.6 * source.random()),
            agreement=min(1.0, chance + 0.2 * (1 - chance) * source.random()),
        )
        for n in range(PROMPTS)
    }
    quality = sum(score.quality for score in scores.values()) / PROMPTS
    margin = 2 * math.sqrt(quality * (1 - quality) / PROMPTS)
    worst = min(scores, key=lambda name: (scores[name].quality, -scores[name].kl))
    measures = Measures(
        PROMPTS,
        quality,
        max(0.0, quality - margin),
        min(1.0, quality + margin),
        sum(score.kl for score in scores.values()) / PROMPTS,
        sum(score.agreement for score in scores.values()) / PROMPTS,
        worst,
        scores[worst],
    )
    return Finding(method, measures, quality)


def _best(found, *, needs_maps):
    best = {}
    for finding in found:
        plan = finding.method
        if plan.needs_maps is not needs_maps:
            continue
        kind = plan.recomputed, len(plan.mapped) > 1
        if kind not in best or finding.measures.kl < best[kind].measures.kl:
            best[kind] = finding
    return [best[kind] for kind in sorted(best)]
