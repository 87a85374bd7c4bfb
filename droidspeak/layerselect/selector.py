"""The choice of a plan for one request.

    requests wait   the least computing that reaches the quality floor (paper, section 5): the fewest
                    recomputed layers, unless what a plan maps instead would take longer
    idle            the plan with the shortest predicted time to first token at the bandwidth of the tier
                    that holds the chunks (beyond the paper); with an objective, the most recompute that
                    still meets it (paper, Appendix B), if that is more

Load never raises the number of recomputed layers, and less bandwidth never lowers it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from droidspeak.errors import UsageError
from droidspeak.layerselect.plan import Plan
from droidspeak.layerselect.policy import Costs, FrontierPoint, Policy

__all__ = ["Requirement", "Situation", "choose", "predicted_ttft"]


@dataclass(frozen=True)
class Requirement:
    """What one request asks of a plan.

    Attributes:
        quality_floor: least quality, as a share of full prefill's.
        slo: seconds until the first token that leave time to recompute more; `None` asks for the
            shortest.

    Raises:
        UsageError: a number that is not allowed.
    """

    quality_floor: float = 0.95
    slo: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.quality_floor):
            raise UsageError(f"quality floor {self.quality_floor}: allowed are finite numbers")
        if self.slo is not None and not 0 < self.slo < math.inf:
            raise UsageError(f"SLO of {self.slo} s: allowed are positive numbers")


@dataclass(frozen=True)
class Situation:
    """What a request meets.

    Attributes:
        tokens: that come from the sender's cache.
        kv_bytes: of K and V of one layer for one token.
        e_bytes: of E of one layer for one token.
        bandwidth: bytes per second that the chunks come with; `None` if nobody knows.
        queue_depth: requests that wait.

    Raises:
        UsageError: a number that is not allowed.
    """

    tokens: int
    kv_bytes: float
    e_bytes: float
    bandwidth: float | None = None
    queue_depth: int = 0

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise UsageError(f"bandwidth of {self.bandwidth} bytes/s: allowed are positive numbers")
        if min(self.tokens, self.kv_bytes, self.e_bytes, self.queue_depth) < 0:
            raise UsageError("tokens, bytes and queue depth: allowed are 0 and more")


def choose(policy: Policy, requirement: Requirement, situation: Situation | None = None) -> Plan | None:
    """The plan for one request, `None` if none reaches the floor.

    A plan that loads nothing is the receiver's own prefill. Where bandwidth is not known loading takes no
    time, and where costs are not known the fewest recomputed layers stand for the shortest time. Among
    plans that are the same in this the better quality wins, then fewer maps, then the earlier group. The
    order of the frontier is of no account.
    """
    allowed = [point for point in policy.frontier if point.quality >= requirement.quality_floor]
    if not allowed:
        return None
    if situation is None or policy.costs is None:
        return min(allowed, key=_preference).plan
    if situation.queue_depth:
        # As if nothing had to be loaded: other requests compute meanwhile.
        return _fastest(policy.costs, allowed, replace(situation, bandwidth=None))
    fastest = _fastest(policy.costs, allowed, situation)
    thorough = _most_within(policy.costs, allowed, situation.tokens, requirement.slo) or fastest
    return max(fastest, thorough, key=lambda plan: plan.recomputed)


def predicted_ttft(costs: Costs, plan: Plan, situation: Situation) -> float:
    """Seconds until the first token: `max(load E + compute, load reused) + suffix`.

    Args:
        situation: with a bandwidth. Without one, loading takes no time.
    """
    return _ttft(costs, plan, situation, len(plan.transition_layers))


def _ttft(costs: Costs, plan: Plan, situation: Situation, e_layers: int) -> float:
    rate = situation.tokens / situation.bandwidth if situation.bandwidth else 0.0
    load_e = e_layers * situation.e_bytes * rate
    load_reused = len(plan.loaded) * situation.kv_bytes * rate
    return max(load_e + _compute(costs, plan, situation.tokens), load_reused) + costs.suffix


def _compute(costs: Costs, plan: Plan, tokens: int) -> float:
    """Seconds of recompute and of mapping. Mapping E counts like mapping K and V of a layer."""
    recompute = plan.recomputed * (costs.per_token + costs.per_token_pair * tokens) * tokens
    return recompute + plan.maps * costs.per_mapped_token * tokens


def _fastest(costs: Costs, allowed: Sequence[FrontierPoint], situation: Situation) -> Plan:
    """The plan with the shortest predicted time, of equals that with fewer recomputed layers.

    All plans that load are charged the most E that any of them loads. Then the predictions for two of them
    cross at one bandwidth only: with less, the one that loads fewer layers stays ahead.
    """
    most_e = max(len(point.plan.transition_layers) for point in allowed)

    def order(point: FrontierPoint) -> tuple[object, ...]:
        charged = most_e if point.plan.loaded else 0
        return _ttft(costs, point.plan, situation, charged), *_preference(point)

    return min(_undominated(costs, allowed, situation.tokens), key=order).plan


def _undominated(costs: Costs, allowed: Sequence[FrontierPoint], tokens: int) -> list[FrontierPoint]:
    """Points less those that compute longer than one that recomputes more layers, because of what they map.

    Such a plan is never ahead, but beside a long transfer the difference may be lost to rounding.
    """
    kept: list[FrontierPoint] = []
    for point in sorted(allowed, key=lambda point: (-point.plan.recomputed, _preference(point))):
        needs = _compute(costs, point.plan, tokens)
        others = (other for other in kept if other.plan.recomputed > point.plan.recomputed)
        if all(needs <= _compute(costs, other.plan, tokens) for other in others):
            kept.append(point)
    return kept


def _most_within(
    costs: Costs, allowed: Sequence[FrontierPoint], tokens: int, slo: float | None
) -> Plan | None:
    """The most recompute that ends by `slo`, whatever the bandwidth; `None` without any, or without `slo`."""
    if slo is None:
        return None
    within = [point for point in allowed if _compute(costs, point.plan, tokens) + costs.suffix <= slo]
    if not within:
        return None
    most = max(point.plan.recomputed for point in within)
    return min((point for point in within if point.plan.recomputed == most), key=_preference).plan


def _preference(point: FrontierPoint) -> tuple[object, ...]:
    plan = point.plan
    return plan.recomputed, -point.quality, plan.maps, plan.groups, plan.actions, plan.map_e
