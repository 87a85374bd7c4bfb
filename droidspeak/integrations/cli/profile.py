"""`droidspeak profile`: find out what one model must recompute over another one's cache."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from droidspeak import __version__
from droidspeak.errors import UsageError
from droidspeak.integrations.cli.machine import machine
from droidspeak.integrations.cli.output import Format, FormatOption, note, progress, show_document, show_table
from droidspeak.integrations.cli.report import import_parts, write_report
from droidspeak.integrations.cli.workers import workers
from droidspeak.integrations.transformers.profiling import Observe, PairJob
from droidspeak.layerselect import MapFile, Policy
from droidspeak.layerselect.artifact import Side, write_profile_policy
from droidspeak.layerselect.journal import Journal, Runner
from droidspeak.layerselect.mapfeatures import MapFeatures
from droidspeak.layerselect.profile import Finding, Profile
from droidspeak.layerselect.profiler import ProfileOptions, Search
from droidspeak.storage import SourceManifest

__all__ = ["profile", "profile_pair"]


def profile(
    sender: Annotated[Path, typer.Option(help="Model folder whose cache is to be shared.")],
    receiver: Annotated[Path, typer.Option(help="Model folder that is to use it.")],
    calibration: Annotated[Path, typer.Option(help="JSONL of prompts to choose by and to fit maps on.")],
    held_out: Annotated[Path, typer.Option(help="JSONL of other prompts, to measure on.")],
    out: Annotated[Path, typer.Option(help="Policy file to write.")],
    report: Annotated[Path | None, typer.Option(help="Also write a page with all figures, and PNGs.")] = None,
    metric: Annotated[
        str, typer.Option(help="exact-match, f1, rouge-l, edit-similarity or kl.")
    ] = "exact-match",
    method: Annotated[
        Search, typer.Option(help="full: task metric on all prompts; fast: divergence on a few.")
    ] = Search.FAST,
    granularity: Annotated[int, typer.Option(min=1, help="Groups start and end at multiples of it.")] = 1,
    prompts: Annotated[int, typer.Option(min=1, help="Calibration prompts that `fast` uses.")] = 16,
    maps: Annotated[bool, typer.Option(help="Fit maps, and try plans with them.")] = True,
    baselines: Annotated[
        bool, typer.Option(help="Also measure sensitivity, scattered layers, CacheBlend.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Processes, or actors on Ray.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each worker.")] = None,
    device: Annotated[str, typer.Option(help="Where workers put their models, such as cuda.")] = "cpu",
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster; local starts one.")] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Profile an ordered pair: which layers must the receiver recompute over the sender's cache?

    Writes a policy: the frontier of plans with their measures. Interrupted, the same command goes on where
    it was.
    """
    options = ProfileOptions(metric, method, granularity, prompts, baselines)
    kinds = tuple(MapFeatures) if maps else ()
    job = PairJob(
        sender,
        receiver,
        calibration,
        held_out,
        options,
        kinds,
        max_new_tokens,
        _threads(threads, workers),
        device,
    )
    found = profile_pair(job, out, count=workers, ray_address=ray, report=report)
    for warning in found.warnings:
        note(f"warning: {warning}")
    show_document(format, _summary(found, out), lambda: _show(found, out))


def profile_pair(
    job: PairJob, out: Path, *, count: int = 1, ray_address: str | None = None, report: Path | None = None
) -> Profile:
    """Profiles `job` and writes its policy to `out`, its maps and its report beside it; all or nothing.

    Raises:
        UsageError, IdentityError: what cannot be profiled, or a place that cannot be written.
    """
    job.check()
    _require_place(out)
    if report is not None:
        _require_place(report)
        # Now, not after everything has been measured.
        import_parts()
    with workers(job.spec, count, ray_address) as runner:
        journal = job.journal(out.with_name(f".{out.name}.partial"))
        found = _profile(job, journal, runner)
    found = replace(found, policy=_keep_maps(found, out), provenance=_provenance(job, count, ray_address))
    write_profile_policy(out, found, *map(_side, (job.sender, job.receiver), job.manifests))
    if report is not None:
        write_report(found, report)
    journal.remove()
    return found


def _profile(job: PairJob, journal: Journal, runner: Runner) -> Profile:
    if journal.resumed:
        note(f"going on: {journal.resumed} results are there already")
    try:
        with _bars() as observe:
            return job.profile(journal, runner, observe)
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from what is done")
        raise
    except UsageError:
        # It would go wrong again: nothing is left half-done.
        journal.remove()
        raise


def _threads(threads: int | None, count: int) -> int | None:
    """Workers share the processors unless somebody says otherwise."""
    return threads or (max(1, (os.cpu_count() or 1) // count) if count > 1 else None)


def _require_place(path: Path) -> None:
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UsageError(f"{path} cannot be written: allowed is a file in a folder that is there")


def _keep_maps(found: Profile, out: Path) -> Policy:
    """The policy with its maps beside `out`."""
    maps = found.policy.maps
    if maps is None:
        return found.policy
    kept = out.with_name(f"{out.stem}.maps.safetensors")
    temporary = kept.with_name(f".{kept.name}.new")
    shutil.copyfile(maps.path, temporary)
    temporary.replace(kept)
    return replace(found.policy, maps=MapFile(kept, maps.sha256))


def _side(folder: Path, manifest: SourceManifest) -> Side:
    return Side.of(folder.resolve().name, manifest)


def _provenance(job: PairJob, count: int, ray_address: str | None) -> dict[str, Any]:
    return {
        "created": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "droidspeak": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": machine(),
        "workers": count,
        "ray": ray_address is not None,
        "max_new_tokens": job.max_new_tokens,
    }


@contextmanager
def _bars() -> Iterator[Observe]:
    """A progress bar for each title, with the time that is left."""
    with progress(remaining=True) as bars:
        rows: dict[str, Any] = {}

        def observe(title: str, done: int, total: int) -> None:
            if title not in rows:
                rows[title] = bars.add_task(title, total=total)
            bars.update(rows[title], completed=done)

        yield observe


def _show(found: Profile, out: Path) -> None:
    title = (
        f"{found.sender_name} -> {found.receiver_name}: {found.layers} layers, {found.metric} on "
        f"{found.full_prefill.measures.prompts} held-out prompts"
    )
    rows = {"full prefill": found.full_prefill, "reuse": _full_reuse(found)}
    by_plan = {finding.method: finding for finding in found.candidates}
    rows |= {str(point.plan): by_plan[point.plan] for point in found.policy.frontier}
    columns = ["", "layers", "quality", "95 %", "of full", "KL", "agreement", "worst prompt"]
    show_table(title, columns, [_row(name, finding) for name, finding in rows.items()])
    work = found.work
    note(
        f"policy written to {out}; {work.seconds:,.0f} s; the search took {work.partial_prefills} recompute "
        f"runs, {work.each_group / max(1, work.layer_tokens):.1f} x less prefill than one run per group"
    )


def _full_reuse(found: Profile) -> Finding:
    return next(finding for finding in found.candidates if str(finding.method) == "reuse")


def _row(name: str, finding: Finding) -> list[str]:
    measures = finding.measures
    return [
        name,
        "" if finding.recomputed is None else str(finding.recomputed),
        f"{measures.quality:.3f}",
        f"{measures.low:.3f}-{measures.high:.3f}",
        f"{finding.share:.3f}",
        f"{measures.kl:.4f}",
        f"{measures.agreement:.3f}",
        f"{measures.worst_prompt} ({measures.worst.quality:.2f})",
    ]


def _summary(found: Profile, out: Path) -> dict[str, Any]:
    """The JSON of the command; its keys are a contract."""
    return {
        "version": 1,
        "policy": str(out),
        "sender": found.sender_name,
        "receiver": found.receiver_name,
        "layers": found.layers,
        "metric": found.metric,
        "full_prefill": found.full_prefill.measures.quality,
        "sender_alone": found.sender_alone.quality,
        "full_reuse": _full_reuse(found).measures.quality,
        "frontier": _points(found),
        "maps": found.map_features,
        "warnings": list(found.warnings),
        "work": {
            "partial_prefills": found.work.partial_prefills,
            "layer_tokens": found.work.layer_tokens,
            "each_group": found.work.each_group,
            "seconds": found.work.seconds,
        },
    }


def _points(found: Profile) -> Sequence[dict[str, Any]]:
    return [
        {"plan": str(point.plan), "recomputed": point.plan.recomputed, "quality": point.quality}
        for point in found.policy.frontier
    ]
