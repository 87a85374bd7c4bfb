"""The answer to every request: a status, and a reason from a closed list.

The contract follows what operators asked for in vLLM's semantic router (epic 2976): nothing is silent,
and the cache is never needed for a correct answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from droidspeak.layerselect import Plan

__all__ = ["Outcome", "Reason", "Status"]


class Status(StrEnum):
    """What became of a request."""

    APPLIED = "applied"
    FALLBACK_REPREFILL = "fallback_reprefill"
    UNSUPPORTED = "unsupported"


class Reason(StrEnum):
    """Why. The comment above each block says with which status it comes."""

    # applied
    EXACT_HIT = "exact_hit"
    CROSS_MODEL_HIT = "cross_model_hit"
    # fallback_reprefill
    MISS = "miss"
    TOO_SHORT = "too_short"
    OPTED_OUT = "opted_out"
    E_MISSING = "e_missing"
    BELOW_FLOOR = "below_floor"
    PREFILL_CHOSEN = "prefill_chosen"
    LOSSY_CODEC = "lossy_codec"
    DRIFT = "drift"
    EVICTED = "evicted"
    CORRUPT = "corrupt"
    TIMEOUT = "timeout"
    STORE_UNAVAILABLE = "store_unavailable"
    # unsupported; the `other_*` values are those of `droidspeak.storage.Mismatch`
    UNKNOWN_WEIGHTS = "unknown_weights"
    OTHER_ARCHITECTURE = "other_architecture"
    OTHER_ROPE = "other_rope"
    OTHER_DTYPE = "other_dtype"
    OTHER_TOKENIZER = "other_tokenizer"
    OTHER_LAYOUT = "other_layout"
    NO_POLICY = "no_policy"
    POLICY_REFUSED = "policy_refused"
    MAPS_UNUSABLE = "maps_unusable"

    @property
    def status(self) -> Status:
        """The status that this reason comes with."""
        if self in (Reason.EXACT_HIT, Reason.CROSS_MODEL_HIT):
            return Status.APPLIED
        if self in _UNSUPPORTED:
            return Status.UNSUPPORTED
        return Status.FALLBACK_REPREFILL


_UNSUPPORTED = frozenset(
    {
        Reason.UNKNOWN_WEIGHTS,
        Reason.OTHER_ARCHITECTURE,
        Reason.OTHER_ROPE,
        Reason.OTHER_DTYPE,
        Reason.OTHER_TOKENIZER,
        Reason.OTHER_LAYOUT,
        Reason.NO_POLICY,
        Reason.POLICY_REFUSED,
        Reason.MAPS_UNUSABLE,
    }
)


@dataclass(frozen=True)
class Outcome:
    """The answer to one request.

    Attributes:
        tokens: length of the prompt.
        exact_tokens: leading tokens taken from the receiver's own cache.
        shared_tokens: tokens after them taken from `source`'s cache by `plan`.
        bytes_loaded: bytes that came out of the store.
        wait_seconds: time for which the engine stood still, waiting for the store.
    """

    reason: Reason
    tokens: int
    exact_tokens: int = 0
    shared_tokens: int = 0
    plan: Plan | None = None
    source: str | None = None
    bytes_loaded: int = 0
    wait_seconds: float = 0.0

    @property
    def status(self) -> Status:
        return self.reason.status
