"""`droidspeak demo`: one model prefills, another one answers from its cache, in two processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from droidspeak import __version__
from droidspeak.errors import ConfigError, DroidSpeakError, UsageError
from droidspeak.integrations.cli.demo_task import TIMING, Task
from droidspeak.integrations.cli.machine import machine
from droidspeak.integrations.cli.output import Format, FormatOption, note, progress, show_document, show_table
from droidspeak.layerselect import Plan
from droidspeak.layerselect.artifact import Side, read_artifact
from droidspeak.prompts import load_prompts
from droidspeak.storage import DEFAULT_CHUNK_SIZE, SourceManifest

__all__ = ["demo"]

_LAB = Path(__file__).parents[3] / "lab"
_LAB_PAIR = ("coder", "base")
_LAB_CHUNK_SIZE = 64
_TIMING = Task(
    sender=f"{TIMING}1",
    receiver=f"{TIMING}2",
    store="",
    plans=["reuse", "4-5", "4-7"],
    chunk_size=DEFAULT_CHUNK_SIZE,
    max_new_tokens=1,
    repeats=3,
)
_COLUMNS = ["", "exact match", "F1", "token agreement", "TTFT ms", "speed-up", "loaded", "status"]


def demo(
    sender: Annotated[Path | None, typer.Option(help="Model folder whose cache is shared.")] = None,
    receiver: Annotated[Path | None, typer.Option(help="Model folder that answers.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of id, prefix, question, answer.")] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per chunk, a power of two from 16.")] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="Layers to recompute, such as 0-3; may be repeated.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Show the plans of this policy file (`droidspeak profile`).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 8,
    store: Annotated[
        Path | None, typer.Option(help="Keep the cache in this folder (else a temporary one).")
    ] = None,
    timing: Annotated[bool, typer.Option(help="Also time a model of 16 layers with random weights.")] = True,
    format: FormatOption = Format.TABLE,
) -> None:
    """Share a KV cache between two fine-tuned models and see what it costs and saves.

    Without options it uses two models of the lab. With --sender, --receiver and --prompts it uses
    yours: transformers folders, prompts as text or token ids.
    """
    given = [option is not None for option in (sender, receiver, prompts)]
    if any(given) and not all(given):
        raise UsageError("--sender, --receiver and --prompts go together: give all three, or none")
    with _store_folder(store) as folder:
        if sender and receiver and prompts:
            task = _own_task(sender, receiver, prompts, folder)
        else:
            task = _lab_task(folder)
        if policy is not None:
            task = _with_policy(task, policy)
        task = replace(
            task,
            plans=_plans(task, plan),
            chunk_size=chunk_size or task.chunk_size,
            limit=limit,
            max_new_tokens=max_new_tokens,
        )
        report = {
            "version": 1,
            "droidspeak": __version__,
            "machine": machine(),
            **_run(task, folder, timing),
        }
    show_document(format, report, lambda: _show(report))


def _own_task(sender: Path, receiver: Path, prompts: Path, folder: Path) -> Task:
    load_prompts(prompts)
    for model in (sender, receiver):
        SourceManifest.from_folder(model)
    return Task(str(sender), str(receiver), str(folder), [], DEFAULT_CHUNK_SIZE, prompts=str(prompts))


def _lab_task(folder: Path) -> Task:
    if not (_LAB / "pairs.json").is_file():
        raise UsageError(
            f"no lab models in {_LAB}: run from a checkout, or give --sender, --receiver, --prompts"
        )
    sender, receiver = _LAB_PAIR
    models, prompts = _LAB / "models", _LAB / "prompts" / f"{receiver}.jsonl"
    plans = _lab_plans(sender, receiver)
    return Task(
        str(models / sender),
        str(models / receiver),
        str(folder),
        plans,
        _LAB_CHUNK_SIZE,
        prompts=str(prompts),
    )


def _with_policy(task: Task, path: Path) -> Task:
    """The plans of a policy file that reuse layers. Raises `PolicyError` if it is for another pair."""
    artifact = read_artifact(path)
    sides = (Path(folder) for folder in (task.sender, task.receiver))
    artifact.require_pair(*(Side.of(side.name, SourceManifest.from_folder(side)) for side in sides))
    plans = [point.plan for point in artifact.policy(path.parent).frontier]
    return replace(task, policy=str(path), plans=[str(plan) for plan in plans if plan.loaded])


def _lab_plans(sender: str, receiver: str) -> list[str]:
    """Groups that the lab chose on its calibration prompts: one layer too few, enough, one more."""
    pairs = json.loads((_LAB / "pairs.json").read_text())
    pair = next(row for row in pairs if (row["sender"], row["receiver"]) == (sender, receiver))
    groups = [f"{point['start']}-{point['end']}" for point in pair["chosen"]]
    good = (point["exact_match"] >= pair["full_prefill"] - 0.01 for point in pair["chosen"])
    enough = next(size for size, reached in enumerate(good) if reached)
    return groups[max(0, enough - 1) : enough + 2]


def _plans(task: Task, wanted: list[str] | None) -> list[str]:
    """Full reuse, then what was asked for; without a profile the first third and the first half."""
    layers = _layers(Path(task.receiver))
    chosen = wanted or task.plans or [f"0-{max(0, layers // 3 - 1)}", f"0-{max(0, layers // 2 - 1)}"]
    return list(dict.fromkeys(["reuse", *(str(Plan.parse(text, layers)) for text in chosen)]))


def _layers(folder: Path) -> int:
    return SourceManifest.from_folder(folder).architecture.layers


def _run(task: Task, folder: Path, timing: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"pair": {"sender": task.sender, "receiver": task.receiver}}
    with progress() as bars:
        report["pair"] |= {"chunk_size": task.chunk_size, "prompts": task.prompts}
        report["pair"] |= {"sent": _play("sender", task, "sender prefills", bars)}
        report["pair"] |= _play("receiver", task, "receiver answers", bars)
        if timing:
            timed = replace(_TIMING, store=str(folder / "timing"))
            report["timing"] = {"chunk_size": timed.chunk_size, "random_weights": True}
            report["timing"] |= {"sent": _play("sender", timed, "timing: sender prefills", bars)}
            report["timing"] |= _play("receiver", timed, "timing: receiver answers", bars)
    return report


def _play(role: str, task: Task, title: str, bars: Progress) -> dict[str, Any]:
    """Runs one process to its result, showing its progress."""
    command = [sys.executable, "-m", "droidspeak.integrations.cli.demo_roles", role, json.dumps(asdict(task))]
    bar = bars.add_task(title, total=None)
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True) as process,
    ):
        try:
            result = _follow(process, bars, bar)
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        if result is None:
            noise.seek(0)
            tail = noise.read().strip()[-2000:]
            raise DroidSpeakError(f"the {role} process ended with status {status}: {tail}")
    return result


def _follow(process: subprocess.Popen[str], bars: Progress, bar: Any) -> dict[str, Any] | None:
    for line in process.stdout or ():
        event = json.loads(line)
        kind = event.pop("event")
        if kind == "progress":
            bars.update(bar, completed=event["done"], total=event["total"])
        elif kind == "error":
            raise (
                UsageError(event["message"])
                if event["kind"] == "usage"
                else DroidSpeakError(event["message"])
            )
        else:
            return dict(event)
    return None


@contextmanager
def _store_folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="droidspeak-demo-") as folder:
            yield Path(folder)
        return
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--store {wanted}: {error.strerror}") from None
    yield wanted


def _show(report: dict[str, Any]) -> None:
    pair, made_on = report["pair"], report["machine"]
    tokens = pair["sent"]["prefix_tokens"]
    names = [Path(pair[side]).name for side in ("sender", "receiver")]
    answers = pair["methods"][0]["answers"]
    _table(
        f"{names[0]} -> {names[1]}: {answers} answers over {pair['sent']['prefixes']} prefixes of "
        f"{tokens['min']}-{tokens['max']} tokens, {pair['layers']} layers",
        pair,
        quality=True,
    )
    if timing := report.get("timing"):
        _table(
            f"\nTiming: {timing['layers']} layers of hidden 1024, {_TIMING.random_tokens} tokens, "
            "random weights",
            timing,
            quality=False,
        )
    note(f"\n{made_on['processor']}, {made_on['cores']} cores, torch {made_on['torch']}; TTFT is the median")


def _table(title: str, part: dict[str, Any], *, quality: bool) -> None:
    base = part["methods"][0]["ttft_ms"]["median"]
    rows = [_row(method, base) for method in part["methods"]]
    columns = list(_COLUMNS)
    if not quality:
        # With random weights there is no right answer to agree with.
        columns[1:4], rows = [], [row[:1] + row[4:] for row in rows]
    show_table(title, columns, rows)


def _row(method: dict[str, Any], base: float) -> list[str]:
    ttft = method["ttft_ms"]["median"]
    statuses = ", ".join(f"{name} {count}" for name, count in method["statuses"].items())
    if method["plan"] is None:
        statuses = "no cache"
    return [
        method["method"],
        f"{method['exact_match']:.3f}",
        f"{method['f1']:.3f}",
        f"{method['token_agreement']:.3f}",
        f"{ttft:,.1f}",
        f"{base / ttft:.2f}x",
        f"{method['bytes_loaded'] / 2**20:,.2f} MiB",
        statuses,
    ]
