"""`droidspeak policy`: look at policy files, and see which plan a request would get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from droidspeak.connector.layout import RowLayout
from droidspeak.errors import ConfigError, PolicyError, UsageError
from droidspeak.integrations.cli.output import Format, FormatOption, note, show_document, show_table
from droidspeak.layerselect import (
    Costs,
    Plan,
    Policy,
    PolicySet,
    Requirement,
    Situation,
    choose,
    predicted_ttft,
)
from droidspeak.layerselect.artifact import Artifact, PointPart, Side, read_artifact
from droidspeak.storage import Architecture, SourceManifest
from droidspeak.storage.urls import parse_size

__all__ = ["app"]

app = typer.Typer(name="policy", help="Look at policy files.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(help="Policy file.")]
_WIDEST = 60
# Two profiles of one pair always differ in these.
_NEVER_COMPARED = {"digest", "created"}


@app.command()
def show(file: _File, format: FormatOption = Format.TABLE) -> None:
    """Show a policy: whom it is for, how it was found, and its plans."""
    artifact = read_artifact(file)
    show_document(format, artifact.model_dump(mode="json"), lambda: _show_policy(artifact))


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Folder of policy files.")],
    format: FormatOption = Format.TABLE,
) -> None:
    """List the policies that an engine with this folder would follow, and the files that it refuses."""
    policies = PolicySet.from_folder(folder)
    refused = {refusal.path: refusal.reason for refusal in policies.refused}
    files = sorted(path for path in folder.glob("[!.]*.json") if path not in refused)
    found = [(path, read_artifact(path)) for path in files]
    rows = [_summary(path, artifact, policies) for path, artifact in found]
    bad = [{"file": path.name, "reason": reason} for path, reason in refused.items()]
    columns = ["file", "pair", "layers", "plans", "plan at 0.95", "maps", "made", "state"]
    table = [[_text(value) for value in row.values()] for row in rows]
    table += [[path.name, *[""] * 6, "refused"] for path in refused]
    content = {"version": 1, "policies": rows, "refused": bad}
    show_document(format, content, lambda: show_table(str(folder), columns, table))


@app.command("choose")
def choose_(
    file: _File,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that come from the sender's cache.")],
    floor: Annotated[float, typer.Option(help="Least quality, as a share of full prefill's.")] = 0.95,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait.")] = 0,
    slo_ms: Annotated[
        float | None, typer.Option(help="Time to first token that leaves room for more recompute.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the tier that holds the chunks, such as 2GB/s.")
    ] = None,
    sender: Annotated[Path | None, typer.Option(help="Refuse unless this is the policy's sender.")] = None,
    receiver: Annotated[Path | None, typer.Option(help="The same for the receiver.")] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show which plan a request would get, and what time to first token each plan is predicted to take."""
    artifact = read_artifact(file)
    policy = artifact.policy(file.parent)
    _require_pair(artifact, sender, receiver)
    requirement = Requirement(floor, None if slo_ms is None else slo_ms / 1000)
    layout = _layout(artifact)
    situation = Situation(
        tokens, layout.kv_bytes, layout.e_bytes, _bytes_per_second(bandwidth), queue_depth=queue
    )
    chosen = choose(policy, requirement, situation)
    points = [
        {
            "plan": str(point.plan),
            "recomputed": point.plan.recomputed,
            "quality": point.quality,
            "ttft_ms": _milliseconds(policy.costs, point.plan, situation),
            "allowed": point.quality >= floor,
        }
        for point in policy.frontier
    ]
    content = {"version": 1, "chosen": None if chosen is None else str(chosen), "points": points}
    show_document(format, content, lambda: _show_choice(artifact, policy, chosen, points))


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help="Policy file.")],
    other: Annotated[Path, typer.Argument(help="Policy file to compare it with.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if they differ.")] = False,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show what differs between two policies: pair, plans, measures, costs, maps, prompts, versions."""
    parts = [dict(_leaves(_comparable(read_artifact(path)))) for path in (one, other)]
    names = list(dict.fromkeys([*parts[0], *parts[1]]))
    changes = [
        {"field": name, "one": parts[0].get(name), "other": parts[1].get(name)}
        for name in names
        if parts[0].get(name) != parts[1].get(name)
    ]
    content = {"version": 1, "same": not changes, "changes": changes}
    show_document(format, content, lambda: _show_changes(one, other, changes))
    if changes and exit_code:
        raise typer.Exit(1)


# --- show and list ---


def _show_policy(artifact: Artifact) -> None:
    show_table(_pair(artifact), [""], [[f"{name:<10} {text}"] for name, text in _facts(artifact)])
    rows = [_point_row(point, artifact.layers) for point in artifact.frontier]
    columns = ["plan", "layers", "quality", "95 %", "KL", "agreement", "worst prompt"]
    show_table("\nFrontier", columns, rows)


def _pair(artifact: Artifact) -> str:
    return f"{artifact.sender.name} -> {artifact.receiver.name}"


def _facts(artifact: Artifact) -> Iterator[tuple[str, str]]:
    profile, costs, limits = artifact.profile, artifact.costs, artifact.thresholds
    for role, side in (("sender", artifact.sender), ("receiver", artifact.receiver)):
        yield role, f"{side.name}, source id {side.source_id}"
    yield "layers", str(artifact.layers)
    if profile is None:
        yield "profile", "none: somebody vouches for these plans"
    else:
        yield "profile", f"{profile.search}, {profile.metric}, granularity {profile.granularity}"
        counts = f"{len(profile.calibration.ids)} to choose by, {len(profile.held_out.ids)} held out"
        yield "prompts", counts
        alone = profile.full_prefill.quality, profile.sender_alone.quality
        yield "quality", "full prefill by the receiver {:.3f}, by the sender {:.3f}".format(*alone)
    yield "drifted", f"below agreement {limits.agreement:.3f} or above KL {limits.kl:.3f}"
    if costs is not None:
        per_thousand = 1000 * (costs.per_token + 1000 * costs.per_token_pair)
        yield "recompute", f"{1000 * per_thousand:.3f} ms per layer of 1,000 tokens"
    yield "codec", artifact.codec or "any that is lossless"
    yield "maps", "none" if artifact.maps is None else artifact.maps.file
    yield "made", f"{artifact.created:%Y-%m-%d %H:%M} {artifact.created.tzname()} by {_versions(artifact)}"
    for warning in profile.warnings if profile else ():
        yield "warning", warning


def _versions(artifact: Artifact) -> str:
    return ", ".join(f"{name} {version}" for name, version in artifact.versions.items())


def _point_row(point: PointPart, layers: int) -> list[str]:
    found = point.measures
    row = [point.plan, str(Plan.parse(point.plan, layers).recomputed), f"{point.quality:.3f}"]
    if found is None:
        return [*row, "", "", "", ""]
    return [
        *row,
        f"{found.low:.3f}-{found.high:.3f}",
        f"{found.kl:.4f}",
        f"{found.agreement:.3f}",
        f"{found.worst_prompt} ({found.worst.quality:.2f})",
    ]


def _summary(path: Path, artifact: Artifact, policies: PolicySet) -> dict[str, Any]:
    policy = artifact.policy(path.parent)
    plan = choose(policy, Requirement())
    return {
        "file": path.name,
        "pair": _pair(artifact),
        "layers": artifact.layers,
        "plans": len(artifact.frontier),
        "plan": None if plan is None else str(plan),
        "maps": None if artifact.maps is None else artifact.maps.file,
        "created": artifact.created.isoformat(timespec="seconds"),
        "state": "in use" if policies.get(policy.sender, policy.receiver) == policy else "replaced",
    }


# --- choose ---


def _require_pair(artifact: Artifact, sender: Path | None, receiver: Path | None) -> None:
    def side(folder: Path | None, default: Side) -> Side:
        if folder is None:
            return default
        return Side.of(folder.resolve().name, SourceManifest.from_folder(folder))

    artifact.require_pair(side(sender, artifact.sender.side), side(receiver, artifact.receiver.side))


def _layout(artifact: Artifact) -> RowLayout:
    manifest: Any = artifact.receiver.manifest
    try:
        return RowLayout.of(Architecture(**manifest["architecture"]))
    except (KeyError, TypeError, AttributeError):
        raise PolicyError(f"{artifact.receiver.name}: its manifest describes no architecture") from None


def _bytes_per_second(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text.strip().removesuffix("/s"))
    except ConfigError:
        raise UsageError(f"--bandwidth {text!r}: allowed is a size per second, such as 2GB/s") from None


def _milliseconds(costs: Costs | None, plan: Plan, situation: Situation) -> float | None:
    known = costs is not None and (situation.bandwidth is not None or not plan.loaded)
    return 1000 * predicted_ttft(costs, plan, situation) if costs and known else None


def _show_choice(
    artifact: Artifact, policy: Policy, chosen: Plan | None, points: list[dict[str, Any]]
) -> None:
    verdict = "no plan reaches the floor" if chosen is None else f"plan {chosen}"
    rows = []
    for point in points:
        ttft = point["ttft_ms"]
        state = "chosen" if point["plan"] == str(chosen) else "" if point["allowed"] else "below the floor"
        rows.append(
            [
                point["plan"],
                str(point["recomputed"]),
                f"{point['quality']:.3f}",
                "unknown" if ttft is None else f"{ttft:,.2f}",
                state,
            ]
        )
    columns = ["plan", "layers", "quality", "predicted TTFT ms", ""]
    show_table(f"{_pair(artifact)}: {verdict}", columns, rows)
    if chosen is None or not chosen.loaded:
        note("the receiver prefills in full")
    if policy.costs is None:
        note("this policy has no costs: the fewest recomputed layers are chosen")


# --- diff ---


def _show_changes(one: Path, other: Path, changes: list[dict[str, Any]]) -> None:
    if changes:
        show_table("", ["field", one.name, other.name], [[_text(v) for v in row.values()] for row in changes])
    else:
        note("no difference")


def _comparable(artifact: Artifact) -> dict[str, Any]:
    content = artifact.model_dump(mode="json", exclude=_NEVER_COMPARED)
    points = content.pop("frontier")
    content["plan"] = {point.pop("plan"): point for point in points}
    return content


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _leaves(part, f"{name}.{key}" if name else key)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    text = json.dumps(value) if isinstance(value, list) else str(value)
    if isinstance(value, float):
        text = f"{value:.6g}"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
