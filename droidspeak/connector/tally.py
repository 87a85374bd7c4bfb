"""What is told of lookups and requests: counted, traced, and logged as one line a request.

    lookups {reason}, lookup (duration), ttft_predicted (duration)      counted at every lookup
    requests {status}, reasons {reason}, exact_tokens, shared_tokens {source}, bytes_loaded
    hit_tokens {"source receiver"}, layers {action}, wait_ns            counted at every outcome
    ttft {own, other or none} (duration)                                counted where it is measured

`droidspeak.telemetry` makes metrics of the counters.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

from droidspeak.connector.match import Match
from droidspeak.connector.status import Outcome
from droidspeak.layerselect import PolicySet
from droidspeak.storage import Counters
from droidspeak.tracing import Attributes

__all__ = ["OTHER_MODEL", "Tally", "log_request", "match_attributes"]

OTHER_MODEL = "other"
"""What a model is called that has no policy, beyond the first ones that were served."""

_SERVED = 64


class Tally:
    """Counts for one connector. Threads may share it.

    Models are named by 12 hex digits of their source id: those of policies, and the first 64 that are
    served. A process that serves an adapter per user must not have a label per user.
    """

    def __init__(self, counters: Counters, policies: PolicySet) -> None:
        self._counters, self._policies = counters, policies
        self._lock = threading.Lock()
        self._served: set[str] = set()

    def lookup(self, match: Match, seconds: float) -> None:
        """Counts a lookup that took `seconds`."""
        self._counters.add("lookups", match.reason.value)
        self._counters.observe("lookup", seconds)
        if match.predicted_ttft is not None:
            self._counters.observe("ttft_predicted", match.predicted_ttft)

    def outcome(self, outcome: Outcome, receiver: str | None) -> None:
        """Counts the answer to one request of `receiver`, a source id if it is known."""
        add = self._counters.add
        add("requests", outcome.status.value)
        add("reasons", outcome.reason.value)
        add("exact_tokens", amount=outcome.exact_tokens)
        if outcome.source is not None:
            add("shared_tokens", outcome.source, outcome.shared_tokens)
        add("bytes_loaded", amount=outcome.bytes_loaded)
        add("wait_ns", amount=int(outcome.wait_seconds * 1e9))
        if receiver is not None:
            self._hits(outcome, receiver)

    def ttft(self, outcome: Outcome, seconds: float) -> None:
        """Counts a measured time to first token."""
        hit = "other" if outcome.shared_tokens else "own" if outcome.exact_tokens else "none"
        self._counters.observe("ttft", seconds, hit)

    def _hits(self, outcome: Outcome, receiver: str) -> None:
        asked = self._name(receiver, served=True)
        if outcome.exact_tokens:
            self._counters.add("hit_tokens", f"{asked} {asked}", outcome.exact_tokens)
        if outcome.source is None or outcome.plan is None:
            return
        source = self._name(outcome.source)
        self._counters.add("hit_tokens", f"{source} {asked}", outcome.shared_tokens)
        for action, count in Counter(outcome.plan.actions).items():
            self._counters.add("layers", action.value, count)

    def _name(self, model: str, *, served: bool = False) -> str:
        if self._policies.names(model):
            return model[:12]
        with self._lock:
            if served and len(self._served) < _SERVED:
                self._served.add(model)
            return model[:12] if model in self._served else OTHER_MODEL


def match_attributes(match: Match) -> Attributes:
    """What a span says of a match."""
    return {
        "droidspeak.reason": match.reason.value,
        "droidspeak.exact_tokens": match.exact_tokens,
        "droidspeak.shared_tokens": match.shared_tokens,
        "droidspeak.source": match.source,
        "droidspeak.receiver": match.receiver.source_id if match.receiver else None,
        "droidspeak.plan": str(match.plan) if match.plan else None,
    }


def log_request(log: logging.Logger, outcome: Outcome, receiver: str | None, name: str | None = None) -> None:
    """The line of one request, at debug; a structured handler finds its parts as the record's own.

    Args:
        name: what the engine calls the request.
    """
    if not log.isEnabledFor(logging.DEBUG):
        return
    parts = {
        "id": name,
        "status": outcome.status.value,
        "reason": outcome.reason.value,
        "source": outcome.source,
        "receiver": receiver,
        "plan": str(outcome.plan) if outcome.plan else None,
        "tokens": outcome.tokens,
        "exact_tokens": outcome.exact_tokens,
        "shared_tokens": outcome.shared_tokens,
        "bytes": outcome.bytes_loaded,
        "wait": round(outcome.wait_seconds, 6),
    }
    told = " ".join(f"{name}={part}" for name, part in parts.items() if part is not None)
    log.debug("request %s", told, extra=parts)
