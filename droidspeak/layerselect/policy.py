"""A policy: the frontier of plans of one ordered pair, and the choice among them.

Pairs are named by their source ids, which stand for weights, architecture, tokenizer and adapter. A
policy made for other weights has other ids and simply does not apply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from droidspeak.errors import UsageError
from droidspeak.layerselect.plan import Plan

__all__ = ["FrontierPoint", "Policy", "PolicySet", "Requirement", "choose"]

_SOURCE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FrontierPoint:
    """A plan and the quality measured with it, 1.0 being the receiver's own full prefill."""

    plan: Plan
    quality: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.quality):
            raise UsageError(f"quality {self.quality} of plan {self.plan}: allowed are finite numbers")


@dataclass(frozen=True)
class Policy:
    """Plans for caches of `sender` used by `receiver` (source ids, in this order).

    Raises:
        UsageError: no plans, plans of different numbers of layers, or ids that are none or the same.
    """

    sender: str
    receiver: str
    frontier: tuple[FrontierPoint, ...]

    def __post_init__(self) -> None:
        if not self.frontier or len({point.plan.layers for point in self.frontier}) != 1:
            raise UsageError("a policy needs at least one plan, and all plans of one number of layers")
        if self.sender == self.receiver:
            raise UsageError("a policy is for two different models: one model's own cache is exact")
        for name in (self.sender, self.receiver):
            if not _SOURCE_ID.fullmatch(name):
                raise UsageError(f"source id {name!r}: allowed are 64 hex digits, `SourceManifest.source_id`")

    @classmethod
    def fixed(cls, sender: str, receiver: str, plan: Plan) -> Policy:
        """One plan, whose quality the caller vouches for."""
        return cls(sender, receiver, (FrontierPoint(plan, 1.0),))

    @property
    def layers(self) -> int:
        """Layers of both models."""
        return self.frontier[0].plan.layers

    @property
    def transition_layers(self) -> frozenset[int]:
        """Layers whose E the sender must store."""
        return frozenset(layer for point in self.frontier for layer in point.plan.transition_layers)


@dataclass(frozen=True)
class Requirement:
    """What one request asks of a plan: the least quality, as a share of full prefill's."""

    quality_floor: float = 0.95

    def __post_init__(self) -> None:
        if not math.isfinite(self.quality_floor):
            raise UsageError(f"quality floor {self.quality_floor}: allowed are finite numbers")


def choose(policy: Policy, requirement: Requirement) -> Plan | None:
    """The plan with the fewest recomputed layers at or above the floor, `None` if there is none.

    Among equals the better quality wins, then the earlier group. The order of the frontier is of no account.
    """
    allowed = [point for point in policy.frontier if point.quality >= requirement.quality_floor]
    if not allowed:
        return None
    return min(allowed, key=_preference).plan


def _preference(point: FrontierPoint) -> tuple[object, ...]:
    plan = point.plan
    return plan.recomputed, -point.quality, plan.groups, plan.actions


class PolicySet:
    """Policies by pair; a later policy of a pair replaces the earlier one. Threads may share it."""

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._by_pair: dict[tuple[str, str], Policy] = {}
        for policy in policies:
            self.add(policy)

    def add(self, policy: Policy) -> None:
        self._by_pair[policy.sender, policy.receiver] = policy

    def get(self, sender: str, receiver: str) -> Policy | None:
        return self._by_pair.get((sender, receiver))

    def for_receiver(self, receiver: str) -> list[Policy]:
        """Policies for caches that `receiver` uses, in the order in which their pairs were added."""
        return [policy for policy in self._policies() if policy.receiver == receiver]

    def transition_layers(self, sender: str) -> frozenset[int]:
        """Layers whose E some policy needs from `sender`."""
        needed = [policy.transition_layers for policy in self._policies() if policy.sender == sender]
        return frozenset().union(*needed)

    def __len__(self) -> int:
        return len(self._by_pair)

    def _policies(self) -> list[Policy]:
        # In one step: another thread may add a policy meanwhile.
        return list(self._by_pair.values())
