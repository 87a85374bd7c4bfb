"""The figures of a profile, as SVG for the page and as PNG beside it.

Series differ by mark and line, not by colour alone. Each SVG is drawn twice, for wide and for narrow screens,
and takes its colours from the page's style sheet, so that it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from droidspeak.layerselect import CacheBlend, FrontierPoint, Plan, ReuseOne
from droidspeak.layerselect.profile import Finding, Profile

__all__ = ["CRITICAL", "PALETTE", "Drawing", "drawings", "work_of"]

CRITICAL = 0.1
"""A layer is critical if reusing it alone loses more than this share of quality (paper, section 3)."""

PALETTE = {
    "ink": "#24292f",
    "muted": "#6a737d",
    "grid": "#d9dee3",
    "plain": "#0b6fb8",
    "mapped": "#c75300",
    "scattered": "#8a5aa8",
    "blend": "#0a7f62",
    "page": "#ffffff",
}
"""Colours by the name of their style sheet variable, as they are on white (and in the PNGs)."""

# Points in a picture cannot follow the scheme: these show on both.
_FIXED = {"plain": "#3b92d9", "mapped": "#e0701a"}
_SIZES = {"wide": (10.0, 4.0), "narrow": (3.7, 3.5)}
_MANY_POINTS = 1500
_DECADES = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": PALETTE["ink"],
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
}


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        svg: `<svg>` elements for wide and for narrow screens; the style sheet shows one of them.
        png: 1600 x 640 pixels on white.
    """

    name: str
    svg: str
    png: bytes


def drawings(profile: Profile, recommended: FrontierPoint | None) -> dict[str, Drawing]:
    """The figures that `profile` has data for, by name: `sensitivity`, `groups`, `methods`."""
    found = {}
    if profile.sensitivity:
        found["sensitivity"] = _drawing(
            "sensitivity", _sensitivity_text(profile), lambda axes: _sensitivity(axes, profile)
        )
    if profile.groups:
        found["groups"] = _drawing(
            "groups", _groups_text(profile), lambda axes: _groups(axes, profile, recommended)
        )
    found["methods"] = _drawing("methods", _methods_text(profile), lambda axes: _methods(axes, profile))
    return found


def work_of(finding: Finding, layers: int) -> float:
    """Prefill work in recomputed layers of the whole prefix."""
    method = finding.method
    if isinstance(method, Plan):
        return method.recomputed
    return method.layer_equivalents(layers) if isinstance(method, CacheBlend) else layers


# --- drawing ---


def _drawing(name: str, text: str, draw: Callable[[Axes], None]) -> Drawing:
    svg = "\n".join(_svg(name, kind, text, draw) for kind in _SIZES)
    with _canvas(name, "wide") as (figure, axes):
        draw(axes)
        return Drawing(name, svg, _save(figure, "png", {"Software": None}, dpi=160))


@contextmanager
def _canvas(name: str, kind: str) -> Iterator[tuple[Figure, Axes]]:
    # The salt keeps ids of different figures apart, and the same on every run.
    style: Any = {**_STYLE, "svg.hashsalt": f"{name}-{kind}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZES[kind], layout="constrained")
        yield figure, figure.subplots()


def _save(figure: Figure, form: str, metadata: dict[str, None], **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, metadata=metadata, **options)
    return file.getvalue()


def _svg(name: str, kind: str, text: str, draw: Callable[[Axes], None]) -> str:
    """An `<svg>` element to stand in HTML."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _canvas(name, kind) as (figure, axes):
        draw(axes)
        source = _save(figure, "svg", nothing, transparent=True).decode()
    variables = {colour: f"var(--{variable})" for variable, colour in PALETTE.items()}
    source = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), source)
    view = re.search(r'viewBox="([^"]+)"', source)
    assert view is not None
    body = source[source.index(">", view.end()) + 1 :]
    label = html.escape(text)
    head = f'<svg class="{kind}" viewBox="{view[1]}" role="img" aria-label="{label}"><title>{label}</title>'
    return head + body


def _legend(axes: Axes) -> None:
    """Above the plot, where it covers nothing."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    columns = 3 if figure.get_figwidth() > 5 else 2
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.4)


def _layer_axis(axes: Axes, label: str, layers: int) -> None:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    axes.set_xlabel(label)
    bins = 16 if figure.get_figwidth() > 5 else 8
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(bins, layers), steps=[1, 2, 4, 5, 10], integer=True))


# --- sensitivity (paper, Figure 7) ---


def _lost(profile: Profile) -> dict[int, float]:
    return {
        finding.method.layer: 1 - finding.share
        for finding in profile.sensitivity
        if isinstance(finding.method, ReuseOne)
    }


def _sensitivity(axes: Axes, profile: Profile) -> None:
    lost = _lost(profile)
    for critical, colour, hatch, label in (
        (False, "plain", "", "layer"),
        (True, "mapped", "////", "critical layer: loses more than 10 %"),
    ):
        chosen = {layer: value for layer, value in lost.items() if (value > CRITICAL) is critical}
        if chosen:
            look: dict[str, Any] = {
                "color": PALETTE[colour],
                "hatch": hatch,
                "edgecolor": PALETTE["page"],
                "linewidth": 0,
            }
            bars = axes.bar(list(chosen), list(chosen.values()), width=0.72, label=label, **look)
            if critical and _pitch(axes, profile.layers) > 0.26:
                axes.bar_label(bars, fmt="{:.2f}", fontsize=7, padding=2)
    axes.axhline(0, color=PALETTE["muted"], linewidth=0.8)
    axes.axhline(CRITICAL, color=PALETTE["ink"], linewidth=1, linestyle=(0, (4, 3)))
    low, high = min(0.0, *lost.values()), max(0.15, *lost.values())
    axes.set_ylim(low * 1.1, high * 1.12)
    axes.set_xlim(-0.7, profile.layers - 0.3)
    axes.set_ylabel("quality lost")
    _layer_axis(axes, "the one layer that is reused", profile.layers)
    _legend(axes)


def _pitch(axes: Axes, layers: int) -> float:
    """Inches a layer."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return (figure.get_figwidth() - 0.7) / layers


def _sensitivity_text(profile: Profile) -> str:
    lost = _lost(profile)
    worst = max(lost, key=lambda layer: lost[layer])
    count = sum(value > CRITICAL for value in lost.values())
    return (
        f"Bars: quality lost when one layer alone is reused. {count} of {len(lost)} layers lose more than "
        f"10 %; layer {worst} loses most, {lost[worst]:.3f}."
    )


# --- all groups (paper, Figure 11) ---


def _groups(axes: Axes, profile: Profile, recommended: FrontierPoint | None) -> None:
    divergence = profile.search == "fast"
    places = _places(profile)
    _spots(axes, places)
    _frontier_marks(axes, profile, places)
    if recommended is not None and recommended.plan in places:
        x, y = zip(places[recommended.plan], strict=True)
        ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none"}
        axes.plot(x, y, label="recommended", color=PALETTE["ink"], linestyle="none", **ring)
    if divergence:
        _divergence_axis(axes, max(height for _, height in places.values()))
    else:
        axes.set_ylabel("share of full prefill's quality")
    axes.set_xlim(-0.6, profile.layers + 0.6)
    _layer_axis(axes, "recomputed layers", profile.layers)
    _legend(axes)


def _places(profile: Profile) -> dict[Plan, tuple[float, float]]:
    """Where each plan is drawn: plain ones a little to the left, mapped ones to the right."""
    shift = 0.14 if any(_is_mapped(finding) for finding in profile.groups) else 0.0
    return {
        finding.method: (
            finding.method.recomputed + (shift if finding.method.needs_maps else -shift),
            finding.measures.kl if profile.search == "fast" else finding.share,
        )
        for finding in profile.groups
        if isinstance(finding.method, Plan)
    }


def _spots(axes: Axes, places: Mapping[Plan, tuple[float, float]]) -> None:
    many = len(places) > _MANY_POINTS
    for mapped, marker, colour, label in (
        (False, "o", "plain", "group"),
        (True, "^", "mapped", "group with maps"),
    ):
        points = [place for plan, place in places.items() if plan.needs_maps is mapped]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        edge = (_FIXED if many else PALETTE)[colour]
        look: dict[str, Any] = {"s": 16, "facecolors": "none", "edgecolors": edge, "linewidths": 0.8}
        axes.scatter(x, y, marker=marker, label=label, alpha=0.8, rasterized=many, **look)


def _frontier_marks(axes: Axes, profile: Profile, places: Mapping[Plan, tuple[float, float]]) -> None:
    marks = [places[point.plan] for point in profile.policy.frontier if point.plan in places]
    line = [places[plan] for plan in _best_by_layers(profile) if plan in places]
    if line:
        x, y = zip(*line, strict=True)
        axes.plot(x, y, label="best by layers", color=PALETTE["ink"], linewidth=1.2)
    if marks:
        x, y = zip(*marks, strict=True)
        look: dict[str, Any] = {"color": PALETTE["ink"], "marker": "s", "markersize": 4, "linestyle": "none"}
        axes.plot(x, y, label="frontier", **look)


def _best_by_layers(profile: Profile) -> list[Plan]:
    """The plans of the frontier that better all those with fewer recomputed layers, whatever is mapped."""
    best: list[FrontierPoint] = []
    for point in sorted(profile.policy.frontier, key=lambda point: (point.plan.recomputed, -point.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return [point.plan for point in best]


def _divergence_axis(axes: Axes, highest: float) -> None:
    """Decades above a thousandth of a nat; linear below, so that 0 has a place."""
    axes.set_ylabel("divergence, nats (less is better)")
    if highest <= _DECADES[1]:
        return
    axes.set_yscale("symlog", linthresh=_DECADES[1], linscale=0.4)
    axes.set_ylim(-0.0004, highest * 1.6)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in _DECADES if tick <= highest * 1.6]))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _groups_text(profile: Profile) -> str:
    what = "divergence from full prefill" if profile.search == "fast" else "share of full prefill's quality"
    best = ", ".join(map(str, _best_by_layers(profile)[:12]))
    return (
        f"Scatter: {len(profile.groups)} plans, recomputed layers against {what} on calibration prompts. "
        f"The line joins the best plans by layers: {best}."
    )


# --- methods at equal work ---


def _methods(axes: Axes, profile: Profile) -> None:
    plain = [found for found in profile.candidates if not _is_mapped(found)]
    mapped = [found for found in profile.candidates if _is_mapped(found)]
    blends = [found for found in profile.baselines if isinstance(found.method, CacheBlend)]
    scattered = [
        found for found in profile.baselines if isinstance(found.method, Plan) and found.method.recomputed
    ]
    for findings, label, colour, marker, line in (
        (plain, "one group", "plain", "o", "-"),
        (mapped, "one group with maps", "mapped", "^", "-"),
        (scattered, "most sensitive layers", "scattered", "D", ":"),
        (blends, "CacheBlend", "blend", "s", "--"),
    ):
        _series(axes, profile, findings, label, colour, marker, line, band=line == "-")
    share = profile.sender_alone.quality / (profile.full_prefill.measures.quality or 1.0)
    axes.axhline(share, color=PALETTE["muted"], linestyle=(0, (1, 2)), linewidth=1.2, label="sender alone")
    look: dict[str, Any] = {"marker": "*", "markersize": 11, "linestyle": "none", "color": PALETTE["ink"]}
    axes.plot(profile.layers, profile.full_prefill.share, label="full prefill", **look)
    axes.set_xlim(-0.03 * profile.layers, 1.04 * profile.layers)
    axes.set_ylabel("share of full prefill's quality")
    _layer_axis(axes, "prefill work, in recomputed layers", profile.layers)
    _legend(axes)


def _is_mapped(finding: Finding) -> bool:
    return isinstance(finding.method, Plan) and finding.method.needs_maps


def _series(
    axes: Axes,
    profile: Profile,
    findings: Sequence[Finding],
    label: str,
    colour: str,
    marker: str,
    line: str,
    band: bool,
) -> None:
    if not findings:
        return
    ascending = sorted(findings, key=lambda finding: finding.share)
    best = {work_of(finding, profile.layers): finding for finding in ascending}
    work = sorted(best)
    ordered = [best[layers] for layers in work]
    look: dict[str, Any] = {"color": PALETTE[colour], "marker": marker, "linestyle": line}
    axes.plot(work, [finding.share for finding in ordered], label=label, markersize=4.5, **look)
    if not band:
        return
    full = profile.full_prefill.measures.quality or 1.0
    low = [finding.measures.low / full for finding in ordered]
    high = [finding.measures.high / full for finding in ordered]
    axes.fill_between(work, low, high, color=PALETTE[colour], alpha=0.1, linewidth=0)


def _methods_text(profile: Profile) -> str:
    best = max((found for found in profile.candidates), key=lambda found: found.share, default=None)
    said = f" The best plan is {best.method}, {best.share:.3f}." if best else ""
    return (
        "Lines: prefill work in recomputed layers against the share of full prefill's quality on held-out "
        f"prompts, for groups, groups with maps, the most sensitive layers and CacheBlend.{said}"
    )
