"""The demo's two processes: the sender fills the store, the receiver answers from it.

Each is started as `python -m droidspeak.integrations.cli.demo_roles ROLE TASK` (TASK in JSON) and writes
events, one JSON object a line, to standard output:

    {"event": "progress", "done": 3, "total": 96}
    {"event": "result", ...}
    {"event": "error", "message": "..."}
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from droidspeak.connector import ConnectorOptions
from droidspeak.errors import DroidSpeakError, PromptError, UsageError
from droidspeak.integrations.cli.demo_task import TIMING, Task
from droidspeak.integrations.transformers import DroidSpeak, manifest_of
from droidspeak.integrations.transformers.answer import Answer, PromptEncoder, answer
from droidspeak.integrations.transformers.loading import eos_ids, load_model
from droidspeak.layerselect import FrontierPoint, Plan, Policy, PolicySet
from droidspeak.layerselect.artifact import read_policy
from droidspeak.layerselect.metrics import exact_match, f1, token_agreement
from droidspeak.prompts import Prompt, load_prompts
from droidspeak.storage import SourceManifest, TieredStore
from droidspeak.storage.urls import open_tier

FULL_PREFILL = "full prefill"


@dataclass
class Tally:
    """Everything measured of one method."""

    method: str
    plan: Plan | None
    exact_matches: list[float] = field(default_factory=list)
    f1s: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    bytes_loaded: list[int] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, said: Answer, reference: Answer, units: list[Any], expected: list[Any]) -> None:
        self.exact_matches.append(exact_match(units, expected))
        self.f1s.append(f1(units, expected))
        self.agreements.append(token_agreement(said.token_ids, reference.token_ids))
        self.ttfts.append(said.ttft)
        self.bytes_loaded.append(said.outcome.bytes_loaded)
        self.statuses[said.outcome.status.value] += 1
        self.reasons[said.outcome.reason.value] += 1

    def summary(self, layers: int) -> dict[str, Any]:
        ttfts = sorted(self.ttfts)
        return {
            "method": self.method,
            "plan": None if self.plan is None else str(self.plan),
            "recomputed_layers": layers if self.plan is None else self.plan.recomputed,
            "answers": len(ttfts),
            "exact_match": statistics.fmean(self.exact_matches),
            "f1": statistics.fmean(self.f1s),
            "token_agreement": statistics.fmean(self.agreements),
            "ttft_ms": {
                "median": 1e3 * statistics.median(ttfts),
                "min": 1e3 * ttfts[0],
                "max": 1e3 * ttfts[-1],
            },
            "bytes_loaded": statistics.fmean(self.bytes_loaded),
            "statuses": dict(self.statuses),
            "reasons": dict(self.reasons),
        }


def timing_config() -> LlamaConfig:
    """About 16 layers of hidden 1024: big enough for the times to mean something."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        dtype="float32",
    )


class Side:
    """One of the two models: loaded, identified, with its prompts encoded."""

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task = name, task
        self.folder = None if name.startswith(TIMING) else Path(name)
        self.model = _load(name)
        self.manifest = manifest_of(self.model, self.folder)
        self.eos_ids = eos_ids(self.model)

    def manifest_of(self, name: str) -> SourceManifest:
        """Of the other side: from its folder, or its random weights."""
        if name.startswith(TIMING):
            return manifest_of(_load(name))
        return SourceManifest.from_folder(name, dtype=str(self.model.dtype))

    def prompts(self) -> list[Prompt]:
        if self.task.prompts is None:
            cut, seeded = self.task.random_tokens, torch.Generator().manual_seed(0)
            ids = torch.randint(3, self.model.config.vocab_size, (cut + 16,), generator=seeded).tolist()
            return [Prompt("random", tuple(ids[:cut]), tuple(ids[cut:]), (0,))]
        prompts = load_prompts(self.task.prompts)
        return prompts[: self.task.limit]

    @property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder(self.folder or Path("none"), self.model.config.vocab_size)

    def droid(self, store: TieredStore, policies: PolicySet, *, save: bool) -> DroidSpeak:
        options = ConnectorOptions(chunk_size=self.task.chunk_size)
        return DroidSpeak(self.model, store, policies, folder=self.folder, options=options, save=save)


def send(task: Task) -> dict[str, Any]:
    """The sender prefills every prefix once; the cache lands in the store."""
    side = Side(task.sender, task)
    receiver = side.manifest_of(task.receiver)
    plans = [Plan.parse(text, side.manifest.architecture.layers) for text in task.plans]
    policies = PolicySet([_policy(side.manifest, receiver, plans, task)])
    encoder = side.encoder
    prefixes = {tuple(encoder.encode(prompt)[0]) for prompt in side.prompts()}
    with _store(task) as store, side.droid(store, policies, save=True) as droid:
        for done, token_ids in enumerate(sorted(prefixes), 1):
            droid.prefill(token_ids)
            _emit("progress", done=done, total=len(prefixes))
        saved = droid.connector.counters
    usage = _usage(task)
    lengths = sorted(len(token_ids) for token_ids in prefixes)
    return {
        "prefixes": len(prefixes),
        "prefix_tokens": {"median": statistics.median(lengths), "min": lengths[0], "max": lengths[-1]},
        "chunks": saved.get("chunks_saved"),
        "bytes": usage,
    }


def receive(task: Task) -> dict[str, Any]:
    """The receiver answers every prompt by every method, the methods in turn."""
    side = Side(task.receiver, task)
    sender = side.manifest_of(task.sender)
    layers = side.manifest.architecture.layers
    plans = [Plan.parse(text, layers) for text in task.plans]
    with _store(task) as store:
        droids = {
            str(plan): side.droid(
                store, PolicySet([_policy(sender, side.manifest, [plan], task)]), save=False
            )
            for plan in plans
        }
        tallies = _answer_all(side, droids, plans, sender)
    return {"layers": layers, "methods": [tally.summary(layers) for tally in tallies]}


def _answer_all(
    side: Side, droids: dict[str, DroidSpeak], plans: list[Plan], sender: SourceManifest
) -> list[Tally]:
    full = Tally(FULL_PREFILL, None)
    tallies = {str(plan): Tally(_method(plan), plan) for plan in plans}
    prompts, encoder, task = side.prompts(), side.encoder, side.task
    some = next(iter(droids.values()))
    for done, prompt in enumerate(prompts * task.repeats, 1):
        prefix, question = encoder.encode(prompt)
        ids = [*prefix, *question]
        ask = _asker(ids, task.max_new_tokens, side.eos_ids)
        if done == 1:
            for droid in droids.values():
                ask(droid, sender)
        reference = ask(some, None)
        full.add(reference, reference, encoder.units(reference.token_ids), encoder.expected(prompt))
        for name, droid in droids.items():
            said = ask(droid, sender)
            tallies[name].add(said, reference, encoder.units(said.token_ids), encoder.expected(prompt))
        _emit("progress", done=done, total=len(prompts) * task.repeats)
    return [full, *tallies.values()]


def _asker(
    ids: list[int], max_new_tokens: int, eos_ids: frozenset[int]
) -> Callable[[DroidSpeak, SourceManifest | None], Answer]:
    def ask(droid: DroidSpeak, sender: SourceManifest | None) -> Answer:
        return answer(
            droid,
            ids,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            sender=sender,
            share=sender is not None,
        )

    return ask


def _method(plan: Plan) -> str:
    if plan.needs_maps:
        return f"DroidSpeak, {plan}"
    return "full reuse" if not plan.groups else f"DroidSpeak, layers {plan} recomputed"


def _policy(sender: SourceManifest, receiver: SourceManifest, plans: list[Plan], task: Task) -> Policy:
    if sender.source_id == receiver.source_id:
        raise UsageError("sender and receiver are the same model: its own cache is exact, no plan is needed")
    points = tuple(FrontierPoint(plan, quality=1.0) for plan in plans)
    maps = read_policy(Path(task.policy)).maps if task.policy else None
    return Policy(sender.source_id, receiver.source_id, points, maps=maps)


def _load(name: str) -> PreTrainedModel:
    if name.startswith(TIMING):
        torch.manual_seed(int(name.removeprefix(TIMING)))
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(timing_config()).eval())
    return load_model(name)


def _store(task: Task) -> TieredStore:
    return TieredStore([open_tier({"type": "disk", "path": task.store})])


def _usage(task: Task) -> int:
    with _store(task) as store:
        return sum(usage.nbytes for usage in store.by_tier().values())


def _emit(event: str, **content: Any) -> None:
    print(json.dumps({"event": event, **content}), flush=True)


@contextmanager
def _clean_output() -> Iterator[None]:
    """Keeps standard output for events: whatever a library prints goes to standard error."""
    events = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(events, "w")
    yield


def main(role: str, task_json: str) -> int:
    torch.set_grad_enabled(False)
    try:
        with _clean_output():
            task = Task(**json.loads(task_json))
            _emit("result", **{"sender": send, "receiver": receive}[role](task))
    except DroidSpeakError as error:
        kind = "usage" if isinstance(error, UsageError | PromptError) else "failure"
        _emit("error", kind=kind, message=str(error))
        return 2 if kind == "usage" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
