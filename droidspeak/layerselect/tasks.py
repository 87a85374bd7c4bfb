"""What a profile is made of: tasks that workers measure, and their results. Plain data, for any process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from droidspeak.layerselect.measures import Score
from droidspeak.layerselect.policy import MapFile

__all__ = ["SENDER_ALONE", "Question", "Result", "Task", "Timing", "Unit", "digest_of", "spread"]

SENDER_ALONE = "sender-alone"
"""Stands for the sender's own full prefill among the methods of a result."""


@dataclass(frozen=True)
class Question:
    """`suffix`: token ids after the prefix, at least one. `expected`: units of the right answer."""

    id: str
    suffix: tuple[int, ...]
    expected: tuple[str | int, ...]


@dataclass(frozen=True)
class Unit:
    """One prefix and the questions about it: what one worker does at a time."""

    prefix: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task:
    """Some methods on one unit.

    Attributes:
        methods: their texts.
        generate: score with the task metric; else `quality` is exp(-KL), which needs no answer.
        sender_alone: also score the sender's own full prefill.
    """

    unit: Unit
    methods: tuple[str, ...]
    maps: MapFile | None = None
    generate: bool = True
    sender_alone: bool = False

    @cached_property
    def key(self) -> str:
        """A digest of everything that the result depends on, models and metric apart."""
        content = asdict(self)
        content["maps"] = self.maps and self.maps.sha256
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Timing(NamedTuple):
    """Seconds that recomputing `layers` layers of `tokens` tokens took."""

    layers: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Scores by method and prompt id.

    Attributes:
        runs: layers and tokens of each recompute run.
        timings: of the runs that were timed.
        map_timings: the same for mapping K and V.
        suffix_seconds: of the forward of one question over its cached prefix.
    """

    scores: dict[str, dict[str, Score]]
    runs: list[tuple[int, int]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    map_timings: list[Timing] = field(default_factory=list)
    suffix_seconds: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        """Raises `KeyError` or `TypeError` for what `to_json` did not make."""
        scores = {
            method: {prompt: Score(**score) for prompt, score in rows.items()}
            for method, rows in content["scores"].items()
        }
        return cls(
            scores,
            [(layers, tokens) for layers, tokens in content["runs"]],
            [Timing(*row) for row in content["timings"]],
            [Timing(*row) for row in content["map_timings"]],
            list(content["suffix_seconds"]),
        )


def digest_of(units: Sequence[Unit]) -> str:
    """SHA-256 of prompts' ids and content, in their order."""
    return hashlib.sha256(json.dumps([asdict(unit) for unit in units]).encode()).hexdigest()


def spread(units: Sequence[Unit], limit: int) -> list[Unit]:
    """At most `limit` questions, taken from as many units as there are, in turns."""
    taken = [0] * len(units)
    while sum(taken) < limit and any(n < len(unit.questions) for n, unit in zip(taken, units, strict=True)):
        for index, unit in enumerate(units):
            if sum(taken) < limit and taken[index] < len(unit.questions):
                taken[index] += 1
    return [
        Unit(unit.prefix, unit.questions[:count]) for unit, count in zip(units, taken, strict=True) if count
    ]
