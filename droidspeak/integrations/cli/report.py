"""The report of a profile: one HTML page that needs nothing else, and its figures as PNG.

The page makes no request and runs no script; its own content security policy forbids both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from droidspeak.errors import MissingExtra, UsageError
from droidspeak.layerselect import (
    CacheBlend,
    FrontierPoint,
    Group,
    Measures,
    Plan,
    Requirement,
    ReuseOne,
    choose,
)
from droidspeak.layerselect.profile import Finding, Profile, PromptSet

__all__ = ["write_report"]

_ASKED = Requirement()
_TEMPLATE = Path(__file__).with_name("report.html.jinja")

_Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class _Column:
    name: str
    left: bool = False
    wrap: bool = False


@dataclass(frozen=True)
class _Table:
    columns: Sequence[_Column]
    rows: Sequence[_Row]


def write_report(profile: Profile, path: Path, *, figures: Path | None = None) -> None:
    """Writes the page to `path`, and its figures as PNG; the page comes last, and whole.

    Args:
        figures: folder for `sensitivity.png`, `groups.png` and `methods.png`; by default they lie beside the
            page and carry its name, `report-sensitivity.png`. A figure without data is not written.

    Raises:
        MissingExtra: matplotlib or Jinja is not installed.
        UsageError: a place that cannot be written.
    """
    jinja, drawer = import_parts()
    recommended = _recommended(profile)
    drawings = drawer.drawings(profile, recommended)
    environment = jinja.Environment(
        autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    svg = {
        name: drawings[name].svg if name in drawings else "" for name in ("sensitivity", "groups", "methods")
    }
    page = template.render(_content(profile, recommended), figures=svg, palette=drawer.PALETTE)
    try:
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
        for name, drawing in drawings.items():
            _write(figures / f"{name}.png" if figures else _beside(path, name), drawing.png)
        _write(path, page.encode())
    except OSError as error:
        raise UsageError(f"report {error.filename or path}: {error.strerror}") from None


def import_parts() -> tuple[ModuleType, ModuleType]:
    """Jinja, and what draws the figures. Raises `MissingExtra`."""
    try:
        import jinja2

        from droidspeak.integrations.cli import report_figures
    except ImportError:
        raise MissingExtra("the report", "profile") from None
    return jinja2, report_figures


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}.png")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- what the page says ---


def _content(profile: Profile, recommended: FrontierPoint | None) -> dict[str, Any]:
    return {
        "sender": profile.sender_name,
        "receiver": profile.receiver_name,
        "layers": profile.layers,
        "prompts": profile.full_prefill.measures.prompts,
        "recommended": recommended,
        "verdict": _verdict(profile, recommended),
        "warnings": profile.warnings,
        "cards": list(_cards(profile, recommended)),
        "frontier": _frontier_table(profile, recommended),
        "sensitivity": _sensitivity_table(profile),
        "groups_caption": _groups_caption(profile),
        "methods": _methods_table(profile),
        "worst": _worst_table(profile, recommended),
        "provenance": list(_provenance(profile)),
    }


def _recommended(profile: Profile) -> FrontierPoint | None:
    """What serving picks where nothing else is asked for; `None` if that is full prefill, or nothing."""
    plan = choose(profile.policy, _ASKED)
    points = (point for point in profile.policy.frontier if point.plan == plan and plan.loaded)
    return next(points, None)


def _verdict(profile: Profile, recommended: FrontierPoint | None) -> str:
    reuse = _full_reuse(profile)
    beside = f"; full reuse: {reuse.share:.3f}" if reuse is not None else ""
    if recommended is None:
        best = max(profile.policy.frontier, key=lambda point: (bool(point.plan.loaded), point.quality))
        said = f" The best, {best.plan}, keeps {best.quality:.3f}{beside}." if best.plan.loaded else ""
        floor = f"{100 * _ASKED.quality_floor:.0f} %"
        return f"No plan that reuses layers keeps {floor} of full prefill's quality.{said}"
    plan, kept = recommended.plan, f"{recommended.quality:.3f} of full prefill's quality"
    if not plan.recomputed and not plan.needs_maps:
        return f"Reuse the whole cache: {kept}."
    return f"{_in_words(plan)}: {kept}{beside}."


def _in_words(plan: Plan) -> str:
    parts = []
    if plan.recomputed:
        groups = ", ".join(_span(group) for group in plan.groups)
        e = " from a mapped E" if plan.map_e else ""
        parts.append(f"recompute {plan.recomputed} of {plan.layers} layers ({groups}){e}")
    if plan.mapped:
        which = (
            "all layers" if plan.mapped == plan.loaded and not plan.recomputed else _count(len(plan.mapped))
        )
        parts.append(f"map K and V of {which}")
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def _span(group: Group) -> str:
    return str(group.start) if len(group) == 1 else str(group)


def _count(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"


def _full_reuse(profile: Profile) -> Finding | None:
    offers = [*profile.baselines, *profile.candidates]
    return next((finding for finding in offers if str(finding.method) == "reuse"), None)


def _cards(profile: Profile, recommended: FrontierPoint | None) -> Iterator[dict[str, str]]:
    full, reuse, work = profile.full_prefill.measures, _full_reuse(profile), profile.work
    yield _card("Full prefill", f"{full.quality:.3f}", f"{profile.metric}, {full.prompts} held-out prompts")
    yield _card("Sender alone", f"{profile.sender_alone.quality:.3f}", "the same prompts")
    if reuse is not None:
        yield _card("Full reuse", f"{reuse.share:.3f}", "of full prefill's quality")
    if recommended is not None:
        share = recommended.plan.recomputed / profile.layers
        layers = f"{recommended.plan.recomputed} of {profile.layers}"
        yield _card("Recompute", layers, f"layers: {100 * share:.0f} % of the prefill")
        measures = recommended.measures
        worst = f"; worst prompt {measures.worst.quality:.2f}" if measures else ""
        yield _card("Quality kept", f"{recommended.quality:.3f}", f"by {recommended.plan}{worst}")
    if work.layer_tokens:
        saved = f"{work.each_group / work.layer_tokens:.1f}x"
        yield _card("Search", saved, "less prefill than one run for each group")


def _card(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _groups_caption(profile: Profile) -> str:
    what = (
        "Divergence of the answer tokens from full prefill's; logarithmic above 0.001"
        if profile.search == "fast"
        else "Share of full prefill's quality"
    )
    count = f"{len(profile.groups):,} plans, {len(profile.calibration.ids)} prompts"
    return f"{what}; {count} (as Figure 11 of the paper)."


# --- tables ---


def _frontier_table(profile: Profile, recommended: FrontierPoint | None) -> _Table:
    columns = [
        _Column("Plan"),
        _Column("Layers, first to last", left=True),
        _Column("Recomputed"),
        _Column("Maps"),
        _Column("Of full"),
        *(_Column(name) for name in ("95 %", "KL", "Agreement")),
        _Column("Worst prompt", left=True),
    ]
    rows = []
    for point in profile.policy.frontier:
        measured = ["", "", "", "not measured"]
        if (measures := point.measures) is not None:
            worst = f"{measures.worst_prompt} ({measures.worst.quality:.2f})"
            measured = [
                _interval(measures, profile),
                f"{measures.kl:.4f}",
                f"{measures.agreement:.3f}",
                worst,
            ]
        plan = point.plan
        cells = [str(plan), plan, str(plan.recomputed), str(plan.maps), f"{point.quality:.3f}"]
        rows.append({"chosen": point is recommended, "cells": [*cells, *measured]})
    return _Table(columns, rows)


def _sensitivity_table(profile: Profile) -> _Table:
    columns = [_Column(name) for name in ("Layer", "Quality", "Of full", "Lost", "KL", "Agreement")]
    rows = []
    for finding in profile.sensitivity:
        layer = finding.method.layer if isinstance(finding.method, ReuseOne) else finding.method
        measures = finding.measures
        cells = [str(layer), f"{measures.quality:.3f}", f"{finding.share:.3f}", f"{1 - finding.share:.3f}"]
        rows.append({"chosen": False, "cells": [*cells, f"{measures.kl:.4f}", f"{measures.agreement:.3f}"]})
    return _Table(columns, rows)


def _methods_table(profile: Profile) -> _Table:
    from droidspeak.integrations.cli.report_figures import work_of

    columns = [
        _Column("Method"),
        _Column("What", left=True),
        *(_Column(name) for name in ("Work, layers", "Of full", "95 %", "Quality", "KL", "Agreement")),
    ]
    methods: dict[str, tuple[str, Finding]] = {}
    for finding in (profile.full_prefill, *profile.baselines, *profile.candidates):
        methods.setdefault(str(finding.method), (_kind(finding, profile), finding))
    rows = []
    for kind, finding in sorted(methods.values(), key=lambda row: (work_of(row[1], profile.layers), row[0])):
        measures = finding.measures
        rows.append(
            {
                "chosen": False,
                "cells": [
                    _name(finding),
                    kind,
                    f"{work_of(finding, profile.layers):.1f}".removesuffix(".0"),
                    f"{finding.share:.3f}",
                    _interval(measures, profile),
                    f"{measures.quality:.3f}",
                    f"{measures.kl:.4f}",
                    f"{measures.agreement:.3f}",
                ],
            }
        )
    return _Table(columns, rows)


def _interval(measures: Measures, profile: Profile) -> str:
    full = profile.full_prefill.measures.quality or 1.0
    return f"{measures.low / full:.3f}-{measures.high / full:.3f}"


def _name(finding: Finding) -> str:
    method = finding.method
    return f"{method.ratio:.1%} of the tokens" if isinstance(method, CacheBlend) else str(method)


def _kind(finding: Finding, profile: Profile) -> str:
    method = finding.method
    if isinstance(method, CacheBlend):
        return "CacheBlend"
    if not isinstance(method, Plan):
        return "one layer reused"
    if not method.loaded:
        return "full prefill"
    if method.needs_maps:
        return "one group, maps" if method.recomputed else "maps only"
    if not method.recomputed:
        return "full reuse"
    return "one group" if finding in profile.candidates else "most sensitive layers"


def _worst_table(profile: Profile, recommended: FrontierPoint | None) -> _Table:
    columns = [
        _Column("Plan"),
        _Column("Prompt", left=True, wrap=True),
        *(_Column(name) for name in ("Quality", "Mean quality", "KL", "Agreement")),
    ]
    rows = [
        {
            "chosen": point is recommended,
            "cells": [
                str(point.plan),
                point.measures.worst_prompt,
                f"{point.measures.worst.quality:.3f}",
                f"{point.measures.quality:.3f}",
                f"{point.measures.worst.kl:.4f}",
                f"{point.measures.worst.agreement:.3f}",
            ],
        }
        for point in profile.policy.frontier
        if point.measures is not None
    ]
    return _Table(columns, rows)


# --- provenance ---


def _provenance(profile: Profile) -> Iterator[tuple[str, str]]:
    policy, work = profile.policy, profile.work
    yield "sender", f"{profile.sender_name}, source id {policy.sender}"
    yield "receiver", f"{profile.receiver_name}, source id {policy.receiver}"
    yield "calibration prompts", _prompt_set(profile.calibration)
    yield "held-out prompts", _prompt_set(profile.held_out)
    yield "search", f"{profile.search}, granularity {profile.granularity}, {len(profile.groups)} plans"
    yield (
        "work",
        f"{work.partial_prefills:,} recompute runs of {work.layer_tokens:,} layer-tokens; one run for each "
        f"group would take {work.each_group:,}; {work.seconds:,.1f} s in all",
    )
    yield "maps", profile.map_features or "none"
    if policy.maps is not None:
        yield "maps file", f"{policy.maps.path.name}, SHA-256 {policy.maps.sha256}"
    if (costs := policy.costs) is not None:
        thousand = 1e3 * costs.per_token + 1e6 * costs.per_token_pair
        yield (
            "prefill time",
            f"{thousand * 1e3:,.2f} ms for one layer of 1,000 tokens; {costs.suffix * 1e3:,.2f} ms for the "
            f"new tokens; mapping {costs.per_mapped_token * 1e6:,.2f} ms for one layer of 1,000 tokens",
        )
    thresholds = policy.thresholds
    yield "drift", f"below {thresholds.agreement:.3f} agreement or above {thresholds.kl:.3f} nats"
    for name, value in profile.provenance.items():
        yield name.replace("_", " "), _plain(value)


def _prompt_set(prompts: PromptSet) -> str:
    return f"{len(prompts.ids)}, SHA-256 {prompts.digest}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
