"""The frontier of a policy as the status page draws it: quality against recomputed layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from droidspeak.layerselect import FrontierPoint
from droidspeak.layerselect.artifact import Artifact

__all__ = ["Frontier", "Mark"]

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT = 44, 16
_TOP, _BOTTOM = 12, 26


@dataclass(frozen=True)
class Mark:
    """A plan in the drawing, at `x`, `y` of `WIDTH` x `HEIGHT`."""

    x: float
    y: float
    mapped: bool
    label: str


@dataclass(frozen=True)
class Frontier:
    """What is drawn of one policy.

    Attributes:
        best: corners of the line that joins the best plans by layers.
        ticks: of the vertical axis, `y` and the quality there.
        steps: of the horizontal axis, `x` and the number of layers.
    """

    artifact: Artifact
    points: Sequence[FrontierPoint]
    marks: Sequence[Mark]
    best: str
    ticks: Sequence[tuple[float, float]]
    steps: Sequence[tuple[float, int]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT - 8
    right: int = WIDTH - RIGHT + 8

    @classmethod
    def of(cls, artifact: Artifact) -> Frontier:
        points = sorted(
            (point.content(artifact.layers) for point in artifact.frontier),
            key=lambda point: (point.plan.recomputed, -point.quality),
        )
        low = min(0.9, *(floor(10 * point.quality) / 10 for point in points))
        high = max(1.0, *(point.quality for point in points))

        def place(point: FrontierPoint) -> tuple[float, float]:
            return _across(point.plan.recomputed, artifact.layers), _up(point.quality, low, high)

        marks = [
            Mark(*place(point), point.plan.needs_maps, f"{point.plan}: {point.quality:.3f}")
            for point in points
        ]
        best: list[FrontierPoint] = []
        for point in points:
            if not best or point.quality > best[-1].quality:
                best.append(point)
        step = max(1, -(-artifact.layers // 4))
        return cls(
            artifact,
            points,
            marks,
            " ".join("{:.1f},{:.1f}".format(*place(point)) for point in best),
            [(_up(value, low, high), value) for value in (low, (low + 1) / 2, 1.0)],
            [(_across(layers, artifact.layers), layers) for layers in range(0, artifact.layers + 1, step)],
        )

    @property
    def text(self) -> str:
        """The drawing in words."""
        told = ", ".join(mark.label for mark in self.marks[:12])
        return f"Recomputed layers of {self.artifact.layers} against the share of quality kept. {told}."


def _across(layers: int, of: int) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * layers / of, 1)


def _up(quality: float, low: float, high: float) -> float:
    return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (quality - low) / (high - low), 1)
