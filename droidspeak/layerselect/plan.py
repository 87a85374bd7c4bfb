"""A plan: what happens to each layer of a reused prefix.

`reuse` takes the sender's K and V, `map` corrects them by a fitted map, `recompute` runs the
receiver's own layer. Recomputed layers form contiguous groups; one group is the rule, because each
further transition point starts from another E of the sender and adds its error to all later layers
(paper, Figure 10).

A plan is written as its recompute groups, `"2-3,6-7"`, or `"reuse"` (none) or `"full"` (all layers), and
what is mapped after it: `+emap` corrects E at the transition layers, `+kvmap` corrects K and V of all layers
that are loaded, `+kvmap:0,4-5` of these.

    1-2+emap+kvmap:0      layers 1-2 are recomputed from a mapped E, layer 0 is mapped, the rest reused
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from droidspeak.errors import UsageError

__all__ = ["Action", "Group", "Plan"]

_GROUP = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_TEXT = re.compile(r"(?P<groups>[^+]+)(?P<emap>\+emap)?(?P<kvmap>\+kvmap(?::(?P<layers>[^+]+))?)?")


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
    """One action per layer.

    Attributes:
        map_e: E is mapped before a group starts from it.
    """

    actions: tuple[Action, ...]
    map_e: bool = False

    def __post_init__(self) -> None:
        if not self.actions:
            raise UsageError("a plan needs at least one layer")
        if self.map_e and not self.transition_layers:
            raise UsageError(f"plan {self}: no group starts from an E that could be mapped")

    @classmethod
    def recompute(
        cls, layers: int, groups: Iterable[Group], *, map_e: bool = False, mapped: Iterable[int] = ()
    ) -> Plan:
        """Recomputes `groups` of a model of `layers` layers and reuses the rest. Raises `UsageError`.

        Groups that touch or overlap become one.

        Args:
            map_e: correct E where a group starts from one.
            mapped: layers whose K and V are corrected; those that are recomputed are recomputed.
        """
        actions = [Action.REUSE] * layers
        for layer in mapped:
            if not 0 <= layer < layers:
                raise UsageError(f"mapped layer {layer}: the model has layers 0-{layers - 1}")
            actions[layer] = Action.MAP
        for group in groups:
            if group.end >= layers:
                raise UsageError(f"recompute group {group}: the model has layers 0-{layers - 1}")
            actions[group.start : group.end + 1] = [Action.RECOMPUTE] * len(group)
        plan = cls(tuple(actions))
        return cls(plan.actions, map_e=True) if map_e and plan.transition_layers else plan

    @classmethod
    def parse(cls, text: str, layers: int) -> Plan:
        """From `"reuse"`, `"full"` or groups such as `"0-3"` and `"2-3,6-7+emap"`. Raises `UsageError`."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"plan {text!r}: allowed is GROUPS[+emap][+kvmap[:LAYERS]], such as 1-2+emap")
        mapped = _layers_of(match["layers"]) if match["layers"] else range(layers if match["kvmap"] else 0)
        groups = _groups_of(match["groups"].strip(), layers)
        plan = cls.recompute(layers, groups, map_e=bool(match["emap"]), mapped=mapped)
        if match["emap"] and not plan.map_e:
            raise UsageError(f"plan {text!r}: no group starts from an E that could be mapped")
        return plan

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

    @property
    def mapped(self) -> tuple[int, ...]:
        """Layers whose K and V are loaded and mapped."""
        return tuple(n for n, action in enumerate(self.actions) if action is Action.MAP)

    @property
    def maps(self) -> int:
        """How many maps are applied: one per mapped layer, and one per transition layer whose E is mapped."""
        return len(self.mapped) + (len(self.transition_layers) if self.map_e else 0)

    @property
    def needs_maps(self) -> bool:
        """Whether the policy's maps must be there to follow this plan."""
        return self.maps > 0

    def __str__(self) -> str:
        text = ",".join(str(group) for group in self.groups) or "reuse"
        if self.recomputed == self.layers:
            text = "full"
        if self.map_e:
            text += "+emap"
        if self.mapped:
            text += "+kvmap" if self.mapped == self.loaded else f"+kvmap:{_ranges(self.mapped)}"
        return text


def _groups_of(text: str, layers: int) -> list[Group]:
    if text == "reuse":
        return []
    if text == "full":
        return [Group(0, layers - 1)]
    return [Group.parse(part) for part in text.split(",")]


def _layers_of(text: str) -> list[int]:
    return [layer for part in text.split(",") for layer in Group.parse(part)]


def _ranges(layers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
