"""Prefill time of plans, maps and CacheBlend, on a model whose times mean something."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.measure import Series, interleaved, table
from benchmarks.ttft import LAYERS, random_model
from droidspeak.integrations.transformers import Decoder, PrefixKV, capture, partial_prefill
from droidspeak.integrations.transformers.cacheblend import blend
from droidspeak.integrations.transformers.mapped import mapped_source
from droidspeak.layerselect import CacheBlend, Group, Plan
from droidspeak.layerselect.mapfeatures import MapFeatures, columns
from droidspeak.layerselect.mapping import Maps
from droidspeak.layerselect.ridge import LinearMap

_TOKENS = 1024
_SIZES = (2, 4, 8)
_START = LAYERS // 4


def _maps(kind: MapFeatures, receiver: Decoder, kv_columns: int) -> Maps:
    """Maps of one layer with random weights: what applying them takes depends on their shapes alone."""
    hidden = receiver.config.hidden_size

    def made(mapped: int, outputs: int) -> dict[int, LinearMap]:
        weight = torch.randn(columns(kind, mapped, hidden), outputs)
        return {_START: LinearMap(weight, torch.zeros(outputs))}

    return Maps(kind, made(2 * hidden, hidden), made(kv_columns, kv_columns))


def _calls(
    receiver: Decoder, ids: torch.Tensor, sent: PrefixKV, plans: Mapping[int, Plan]
) -> dict[str, Callable[[], object]]:
    def blended(ratio: float) -> Callable[[], object]:
        return lambda: blend(receiver, ids, sent, capture(receiver, ids, [1], end=1), ratio)

    def planned(plan: Plan) -> Callable[[], object]:
        return lambda: partial_prefill(plan, receiver, ids, sent)

    def mapped(maps: Maps, part: str) -> Callable[[], object]:
        return lambda: getattr(mapped_source(sent, maps, receiver, ids), part)(_START)

    calls: dict[str, Callable[[], object]] = {"full": lambda: receiver.prefill(ids)}
    for size, plan in plans.items():
        calls[f"plan {size}"] = planned(plan)
        calls[f"blend {size}"] = blended(CacheBlend((size - 1) / (LAYERS - 1)).ratio)
    kv_columns = 2 * sent.layers[0][0][0].numel()
    for kind in MapFeatures:
        maps = _maps(kind, receiver, kv_columns)
        calls |= {f"{kind} {part}": mapped(maps, part) for part in ("e", "kv")}
    return calls


def _work_rows(series: Mapping[str, Series]) -> list[list[str]]:
    rows = [["full prefill", series["full"].spread(digits=0), "", ""]]
    for size in _SIZES:
        ours, theirs = series[f"plan {size}"], series[f"blend {size}"]
        rows.append(
            [
                f"{size} of {LAYERS}",
                ours.spread(digits=0),
                theirs.spread(digits=0),
                f"{ours.ratio(theirs):.2f}x",
            ]
        )
    return rows


def _map_rows(series: Mapping[str, Series]) -> list[list[str]]:
    """Each map against one further recomputed layer; a group's last layer needs only K and V."""
    layer = (series["plan 8"].median - series["plan 2"].median) / 6
    return [
        [
            kind,
            series[f"{kind} e"].spread(),
            f"{series[f'{kind} e'].median / layer:.2f}",
            series[f"{kind} kv"].spread(),
            f"{series[f'{kind} kv'].median / layer:.2f}",
        ]
        for kind in MapFeatures
    ]


def run() -> str:
    """The sections of the report."""
    sender, receiver = (Decoder(random_model(seed)) for seed in (1, 2))
    ids = torch.randint(3, 2048, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    plans = {size: Plan.recompute(LAYERS, [Group(_START, _START + size - 1)]) for size in _SIZES}
    with torch.no_grad():
        sent = capture(sender, ids, [_START])
        series = interleaved(_calls(receiver, ids, sent, plans), rounds=5)
    work = table(["layers' work", "group, ms", "CacheBlend, ms", "group is faster by"], _work_rows(series))
    maps = table(
        ["features", "E map, ms", "of a layer", "K and V map of one layer, ms", "of a layer"],
        _map_rows(series),
    )
    return (
        f"## Prefill time at equal work\n\n{LAYERS} layers of hidden 1024, float32, random weights, "
        f"{_TOKENS} tokens, everything in memory; median of five rounds, in brackets the range.\n\n"
        f"{work}\n\nWhat one map takes, embeddings and rotation included, and as a share of one more "
        f"recomputed layer:\n\n{maps}"
    )
