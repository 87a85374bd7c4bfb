"""A policy: the frontier of plans of one ordered pair, and the choice among them.

Pairs are named by their source ids, which stand for weights, architecture, tokenizer and adapter. A
policy made for other weights has other ids and simply does not apply.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from droidspeak.errors import UsageError
from droidspeak.layerselect.plan import Plan

__all__ = ["FrontierPoint", "Policy", "PolicySet", "Requirement", "choose"]


@dataclass(frozen=True)
class FrontierPoint:
    """A plan and the quality measured with it, 1.0 being the receiver's own full prefill."""

    plan: Plan
    quality: float


@dataclass(frozen=True)
class Policy:
    """Plans for caches of `sender` used by `receiver` (source ids, in this order)."""

    sender: str
    receiver: str
    frontier: tuple[FrontierPoint, ...]

    def __post_init__(self) -> None:
        if not self.frontier or len({point.plan.layers for point in self.frontier}) != 1:
            raise UsageError("a policy needs at least one plan, and all plans of one number of layers")
        if self.sender == self.receiver:
            raise UsageError("a policy is for two different models: one model's own cache is exact")

    @classmethod
    def fixed(cls, sender: str, receiver: str, plan: Plan) -> Policy:
        """One plan, whose quality the caller vouches for."""
        return cls(sender, receiver, (FrontierPoint(plan, 1.0),))

    @property
    def transition_layers(self) -> frozenset[int]:
        """Layers whose E the sender must store."""
        return frozenset(layer for point in self.frontier for layer in point.plan.transition_layers)


@dataclass(frozen=True)
class Requirement:
    """What one request asks of a plan: the least quality, as a share of full prefill's."""

    quality_floor: float = 0.95


def choose(policy: Policy, requirement: Requirement) -> Plan | None:
    """The plan with the fewest recomputed layers at or above the floor, `None` if there is none.

    Among equals the better quality wins, then the earlier group.
    """
    allowed = [point for point in policy.frontier if point.quality >= requirement.quality_floor]
    if not allowed:
        return None
    return min(allowed, key=lambda p: (p.plan.recomputed, -p.quality, str(p.plan))).plan


class PolicySet:
    """Policies by pair; a later policy of a pair replaces the earlier one."""

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._by_pair: dict[tuple[str, str], Policy] = {}
        for policy in policies:
            self.add(policy)

    def add(self, policy: Policy) -> None:
        self._by_pair[policy.sender, policy.receiver] = policy

    def get(self, sender: str, receiver: str) -> Policy | None:
        return self._by_pair.get((sender, receiver))

    def for_receiver(self, receiver: str) -> list[Policy]:
        return [policy for (_, name), policy in self._by_pair.items() if name == receiver]

    def transition_layers(self, sender: str) -> frozenset[int]:
        """Layers whose E some policy needs from `sender`."""
        needed = [policy.transition_layers for (name, _), policy in self._by_pair.items() if name == sender]
        return frozenset().union(*needed)

    def __len__(self) -> int:
        return len(self._by_pair)
