"""The drift guard: takes a pair out of service while its answers are worse than what was profiled.

Beyond the paper, which names drift as a limit and suggests to profile again now and then.

    sample(policy)                    whether a request is one to check
    observe(policy, agreement, kl)    what the check found: mixed cache against the receiver's own prefill
    allowed(policy)                   whether the pair may serve

    serving -> drifted    `least` samples are there, and a mean is beyond the policy's thresholds
    drifted -> serving    a whole window of samples came since, and both means are within them by a margin

Means run over a window that starts anew at every change, and leave out the worst sample: one alone never
decides. Under one and the same shift some answers stay good, and a few in a row are no proof: that is why
coming back takes a whole window. While a pair is drifted, more of its requests are checked, so that it comes
back by itself. A pair that was profiled again has another policy, and starts afresh.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from droidspeak.errors import ConfigError

if TYPE_CHECKING:
    from droidspeak.layerselect.policy import Policy

__all__ = ["DriftGuard", "DriftOptions", "DriftState"]

_log = logging.getLogger(__name__)

# Rates such as 0.1 do not add up to 1 exactly.
_ALMOST_ONE = 1 - 1e-9


@dataclass(frozen=True)
class DriftOptions:
    """How often pairs are checked, and when they are judged.

    Attributes:
        sample_rate: share of a pair's requests that are checked; 0 checks none.
        recovery_rate: the same while the pair is drifted, if it is more.
        window: latest samples that count; a drifted pair needs as many to come back.
        least: samples without which no pair drifts.
        margin: how far a drifted pair must be within its thresholds to come back, as a share of the way
            from the threshold to perfect (agreement 1, divergence 0).

    Raises:
        ConfigError: a value that is not allowed.
    """

    sample_rate: float = 0.01
    recovery_rate: float = 0.1
    window: int = 64
    least: int = 8
    margin: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sample_rate", "recovery_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"drift {name} {getattr(self, name)}: allowed is 0 to 1")
        if not 2 <= self.least <= self.window:
            raise ConfigError(f"drift least {self.least}: allowed is 2 to the window, {self.window}")
        if not 0 <= self.margin < 1:
            raise ConfigError(f"drift margin {self.margin}: allowed is 0 to less than 1")


@dataclass(frozen=True)
class DriftState:
    """One pair as the guard sees it, for status pages.

    Attributes:
        sender, receiver: source ids.
        drifted: the pair is out of service.
        samples: in the window.
        agreement, kl: the means that are judged; `None` with less than two samples.
        observed: all samples of this policy.
        since: samples since the pair drifted or came back, or since the first.
    """

    sender: str
    receiver: str
    drifted: bool
    samples: int
    agreement: float | None
    kl: float | None
    observed: int
    since: int


@dataclass
class _Pair:
    """What is known of one pair. `credit` grows with every request; a whole one buys a sample."""

    policy: Policy
    window: deque[tuple[float, float]]
    credit: float = 1.0
    drifted: bool = False
    observed: int = 0
    since: int = 0

    def means(self) -> tuple[float, float] | None:
        """Agreement and divergence, each without its worst sample."""
        if len(self.window) < 2:
            return None
        agreements, divergences = zip(*self.window, strict=True)
        return fmean(sorted(agreements)[1:]), fmean(sorted(divergences)[:-1])

    def turn(self) -> None:
        self.drifted = not self.drifted
        self.window.clear()
        self.since = 0


class DriftGuard:
    """Watches every pair on its own. Threads may share it."""

    def __init__(self, options: DriftOptions | None = None) -> None:
        self.options = options or DriftOptions()
        self._lock = threading.Lock()
        self._pairs: dict[tuple[str, str], _Pair] = {}

    def sample(self, policy: Policy) -> bool:
        """Whether this request of the pair is one to check: the first, and then evenly spread ones."""
        options = self.options
        with self._lock:
            pair = self._pair(policy)
            rate = max(options.sample_rate, options.recovery_rate) if pair.drifted else options.sample_rate
            wanted = rate > 0 and pair.credit >= _ALMOST_ONE
            pair.credit = max(0.0, pair.credit - wanted) + rate
            return wanted

    def observe(self, policy: Policy, agreement: float, kl: float) -> bool:
        """Takes one sample; whether the pair drifted or came back by it.

        Args:
            policy: that the request was served by; a sample of one that was replaced does not count.
            agreement: share of the answer's tokens that are the receiver's own, 0 .. 1.
            kl: mean divergence of their logits, nats; what is not a number counts as infinite.
        """
        with self._lock:
            if self._replaced(policy):
                return False
            pair = self._pair(policy)
            pair.window.append((agreement, math.inf if math.isnan(kl) else kl))
            pair.observed += 1
            pair.since += 1
            if not self._turns(pair):
                return False
            pair.turn()
        _report(policy, pair.drifted)
        return True

    def allowed(self, policy: Policy) -> bool:
        """Whether the pair may serve requests."""
        with self._lock:
            return not self._pair(policy).drifted

    def state(self, policy: Policy) -> DriftState:
        """The pair of `policy` as it is now."""
        with self._lock:
            return _state(self._pair(policy))

    def states(self) -> list[DriftState]:
        """All pairs that requests have asked for."""
        with self._lock:
            return [_state(pair) for pair in self._pairs.values()]

    def _pair(self, policy: Policy) -> _Pair:
        key = (policy.sender, policy.receiver)
        if key not in self._pairs or self._replaced(policy):
            self._pairs[key] = _Pair(policy, deque(maxlen=self.options.window))
        return self._pairs[key]

    def _replaced(self, policy: Policy) -> bool:
        """Whether another policy of the pair is the latest."""
        pair = self._pairs.get((policy.sender, policy.receiver))
        return pair is not None and pair.policy != policy

    def _turns(self, pair: _Pair) -> bool:
        means = pair.means()
        needed = self.options.window if pair.drifted else self.options.least
        if means is None or len(pair.window) < needed:
            return False
        agreement, kl = means
        margin = self.options.margin if pair.drifted else 0.0
        limits = pair.policy.thresholds
        least = limits.agreement + margin * (1 - limits.agreement)
        good = agreement >= least and kl <= limits.kl * (1 - margin)
        return good is pair.drifted


def _state(pair: _Pair) -> DriftState:
    agreement, kl = pair.means() or (None, None)
    return DriftState(
        sender=pair.policy.sender,
        receiver=pair.policy.receiver,
        drifted=pair.drifted,
        samples=len(pair.window),
        agreement=agreement,
        kl=kl,
        observed=pair.observed,
        since=pair.since,
    )


def _report(policy: Policy, drifted: bool) -> None:
    names = policy.sender[:12], policy.receiver[:12]
    if drifted:
        _log.warning("%s -> %s has drifted from its profile: its requests are prefilled in full", *names)
    else:
        _log.warning("%s -> %s is back within its profile: it serves again", *names)
