"""Time to first token: k of L layers recomputed, the rest loaded from the warm disk tier."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.measure import Series, interleaved, table
from droidspeak.integrations.transformers import DroidSpeak, manifest_of
from droidspeak.integrations.transformers.answer import answer
from droidspeak.layerselect import FrontierPoint, Group, Plan, Policy, PolicySet
from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier

LAYERS, _TOKENS, _SUFFIX = 16, 2048, 16
_COUNTS = (1, 2, 4, 8)


def random_model(seed: int) -> PreTrainedModel:
    """16 layers of hidden 1024, random weights, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def _plans() -> list[Plan]:
    groups = [Group(LAYERS // 4, LAYERS // 4 + count - 1) for count in _COUNTS]
    return [Plan.recompute(LAYERS, ()), *(Plan.recompute(LAYERS, [group]) for group in groups)]


def _calls(store: TieredStore) -> dict[str, Callable[[], object]]:
    """One answer of one token by each method; the receiver keeps nothing."""
    sender, receiver = random_model(1), random_model(2)
    sent, received = manifest_of(sender).source_id, manifest_of(receiver).source_id
    token_ids = torch.randint(3, 2048, (_TOKENS + _SUFFIX,)).tolist()

    def policies(plans: list[Plan]) -> PolicySet:
        points = tuple(FrontierPoint(plan, 1.0) for plan in plans)
        return PolicySet([Policy(sent, received, points)] if points else [])

    with DroidSpeak(sender, store, policies(_plans())) as first:
        first.prefill(token_ids)
    assert store.flush()

    def call(plan: Plan | None) -> Callable[[], object]:
        droid = DroidSpeak(receiver, store, policies([plan] if plan else []), save=False)
        expected = 0 if plan is None else _TOKENS

        def run() -> None:
            said = answer(droid, token_ids, max_new_tokens=1, eos_ids=())
            assert said.outcome.shared_tokens == expected

        return run

    return {"full": call(None)} | {str(plan): call(plan) for plan in _plans()}


def _row(plan: Plan, series: dict[str, Series]) -> list[str]:
    ours, full, reuse = series[str(plan)], series["full"], series["reuse"]
    limit = reuse.median + plan.recomputed / LAYERS * full.median
    return [
        f"{plan.recomputed} of {LAYERS}",
        ours.spread(digits=0),
        f"{ours.ratio(full):.2f}x",
        f"{limit * 1e3:,.0f}",
        f"{ours.median / limit:.2f}" if plan.groups else "",
        "<= 1.10" if plan.groups else "",
    ]


def run() -> str:
    """The section of the report."""
    with tempfile.TemporaryDirectory() as folder:
        store = TieredStore([DiskTier(Path(folder), min_free=0)])
        with store, torch.no_grad():
            series = interleaved(_calls(store), rounds=5)
    rows = [["full prefill", series["full"].spread(digits=0), "1.00x", "", "", ""]]
    rows += [_row(plan, series) for plan in _plans()]
    columns = [
        "recomputed layers",
        "TTFT, ms",
        "against full",
        "reuse + k/L full, ms",
        "ours / that",
        "target",
    ]
    title = (
        f"## Time to first token\n\n{LAYERS} layers, hidden 1024, 16 query and 4 KV heads, float32, random "
        f"weights; {_TOKENS} shared tokens, {_SUFFIX} new ones; disk tier, warm page cache.\n\n"
    )
    return title + table(columns, rows)
