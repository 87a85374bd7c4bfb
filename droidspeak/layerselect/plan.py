"""A plan: what happens to each layer of a reused prefix.

`reuse` takes the sender's K and V, `map` corrects them by a fitted map, `recompute` runs the
receiver's own layer. Recomputed layers form contiguous groups; one group is the rule, because each
further transition point starts from another E of the sender and adds its error to all later layers
(paper, Figure 10).

A plan is written as its recompute groups, `"2-3,6-7"`, or `"reuse"` (none) or `"full"` (all layers).
Mapped layers have no text form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from droidspeak.errors import UsageError

__all__ = ["Action", "Group", "Plan"]

_GROUP = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


class Action(StrEnum):
    """What happens to one layer."""

    REUSE = "reuse"
    MAP = "map"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """Contiguous recomputed layers `start .. end`, both included."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise UsageError(f"recompute group {self.start}-{self.end}: allowed is 0 <= start <= end")

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end + 1))

    def __len__(self) -> int:
        return self.end - self.start + 1

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"

    @classmethod
    def parse(cls, text: str) -> Group:
        """From `"4-7"` or `"4"`. Raises `UsageError`."""
        match = _GROUP.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"recompute group {text!r}: allowed is START-END, such as 4-7")
        return cls(int(match[1]), int(match[2] or match[1]))


@dataclass(frozen=True)
class Plan:
    """One action per layer."""

    actions: tuple[Action, ...]

    def __post_init__(self) -> None:
        if not self.actions:
            raise UsageError("a plan needs at least one layer")

    @classmethod
    def recompute(cls, layers: int, groups: Iterable[Group]) -> Plan:
        """Recomputes `groups` of a model of `layers` layers and reuses the rest. Raises `UsageError`.

        Groups that touch or overlap become one.
        """
        actions = [Action.REUSE] * layers
        for group in groups:
            if group.end >= layers:
                raise UsageError(f"recompute group {group}: the model has layers 0-{layers - 1}")
            actions[group.start : group.end + 1] = [Action.RECOMPUTE] * len(group)
        return cls(tuple(actions))

    @classmethod
    def parse(cls, text: str, layers: int) -> Plan:
        """From `"reuse"`, `"full"` or groups such as `"0-3"` and `"2-3,6-7"`. Raises `UsageError`."""
        if text == "reuse":
            return cls.recompute(layers, ())
        if text == "full":
            return cls.recompute(layers, [Group(0, layers - 1)])
        return cls.recompute(layers, [Group.parse(part) for part in text.split(",")])

    @property
    def layers(self) -> int:
        return len(self.actions)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The recompute groups, ascending."""
        found: list[Group] = []
        for layer, action in enumerate(self.actions):
            if action is not Action.RECOMPUTE:
                continue
            if found and found[-1].end == layer - 1:
                found[-1] = Group(found[-1].start, layer)
            else:
                found.append(Group(layer, layer))
        return tuple(found)

    @property
    def transition_layers(self) -> tuple[int, ...]:
        """First layers of the groups that start from a sender's E; a group from layer 0 needs none."""
        return tuple(group.start for group in self.groups if group.start > 0)

    @property
    def recomputed(self) -> int:
        """How many layers are recomputed."""
        return sum(len(group) for group in self.groups)

    @property
    def loaded(self) -> tuple[int, ...]:
        """Layers whose K and V come from the sender, mapped or not."""
        return tuple(n for n, action in enumerate(self.actions) if action is not Action.RECOMPUTE)

    def __str__(self) -> str:
        if not self.groups:
            return "reuse"
        if self.recomputed == self.layers:
            return "full"
        return ",".join(str(group) for group in self.groups)
