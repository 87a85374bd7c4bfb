"""A daemon with something to show: chunks, policies between models, and engines that have told."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from droidspeak.connector.reports import Report, encoded
from droidspeak.layerselect import Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.layerselect.plan import Plan
from droidspeak.layerselect.policy import FrontierPoint
from droidspeak.storage import Architecture, SourceManifest, TieredStore
from droidspeak.storage.testing import make_chunk

from .httpclient import Serving, disk, memory, serving, store_of

LAYERS = 12
_ARCHITECTURE = Architecture("llama", LAYERS, 2, 4, 8, 1000, "rope", "full", "float32")
_FRONTIER = (("reuse", 0.71), ("3-4", 0.93), ("3-6", 0.98), ("2-7", 1.0))


def manifest(name: str) -> SourceManifest:
    return SourceManifest(f"weights of {name}", _ARCHITECTURE, "ids:1000")


def source(name: str) -> str:
    return manifest(name).source_id


def pair(sender: str, receiver: str, tokens: int, **rest: Any) -> dict[str, Any]:
    saved = tokens if sender == receiver else tokens * 0.75
    unstored = 0 if sender == receiver else tokens * 16384
    figures = {"requests": tokens // 512, "tokens": tokens, "tokens_saved": saved, "bytes_unstored": unstored}
    return {"sender": source(sender), "receiver": source(receiver), **figures, **rest}


def report(*pairs: Mapping[str, Any], age: float = 2.0, **rest: Any) -> Report:
    """Of an engine that was heard of `age` seconds ago."""
    updated = datetime.now(UTC) - timedelta(seconds=age)
    content = {
        "id": uuid.uuid4().hex,
        "engine": "transformers",
        "host": "gpu-1",
        "pid": 4711,
        "started": updated - timedelta(hours=3),
        "updated": updated,
        "pairs": pairs,
        "counters": {"requests": {"applied": 8, "fallback_reprefill": 2}},
    }
    return Report.model_validate({**content, **rest})


def policy(folder: Path, sender: str, receiver: str, *, names: tuple[str, str] | None = None) -> Path:
    """A policy file of the pair."""
    folder.mkdir(exist_ok=True)
    points = tuple(FrontierPoint(Plan.parse(plan, LAYERS), quality) for plan, quality in _FRONTIER)
    path = folder / f"{source(sender)[:8]}-{source(receiver)[:8]}.json"
    sides = [
        Side.of(name, manifest(model))
        for name, model in zip(names or (sender, receiver), (sender, receiver), strict=True)
    ]
    write_policy(path, Policy(source(sender), source(receiver), points), *sides)
    return path


@contextmanager
def showing(folder: Path, store: TieredStore | None = None, **server: Any) -> Iterator[Serving]:
    """A daemon over `store` (memory and disk by default) that follows the policies in `folder/policies`."""
    held = store or store_of(memory(), disk(folder / "store"))
    policies = folder / "policies"
    with serving(held, **server) as served:
        if policies.exists():
            served.state.settings = served.state.settings.model_copy(update={"policies": policies})
        yield served


def fill(served: Serving) -> None:
    """Chunks, and what engines have told."""
    for seed in range(4):
        served.store.write(make_chunk(seed))
    served.store.flush()
    served.store.read(make_chunk(0).key)
    drift = {"sender": source("base"), "receiver": source("coder"), "drifted": False, "samples": 40}
    told = [
        report(
            pair("base", "coder", 51200),
            pair("coder", "coder", 20480),
            drift=[{**drift, "agreement": 0.97, "kl": 0.012, "observed": 40}],
        ),
        report(pair("base", "analyst", 12800), pair("coder", "analyst", 2048), engine="vllm", host="gpu-2"),
        report(pair("base", "base", 4096), age=7200, ended=True),
    ]
    for one in told:
        served.store.put_report(one.id, encoded(one))
