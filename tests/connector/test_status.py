"""The closed lists of statuses and reasons: a contract with operators, pinned here."""

from __future__ import annotations

import pytest

from droidspeak.connector import Outcome, Reason, Status
from droidspeak.storage import Mismatch

STATUSES = {
    "applied": ["exact_hit", "cross_model_hit"],
    "fallback_reprefill": [
        "miss",
        "too_short",
        "opted_out",
        "e_missing",
        "below_floor",
        "prefill_chosen",
        "lossy_codec",
        "drift",
        "evicted",
        "corrupt",
        "timeout",
        "store_unavailable",
    ],
    "unsupported": [
        "unknown_weights",
        "other_architecture",
        "other_rope",
        "other_dtype",
        "other_tokenizer",
        "other_layout",
        "no_policy",
        "policy_refused",
        "maps_unusable",
    ],
}


def test_statuses_are_pinned():
    assert [status.value for status in Status] == list(STATUSES)


def test_reasons_are_pinned_and_each_has_its_status():
    found = {status.value: [r.value for r in Reason if r.status is status] for status in Status}
    assert found == STATUSES


@pytest.mark.parametrize("mismatch", Mismatch)
def test_every_mismatch_is_a_reason(mismatch):
    assert Reason(mismatch.value).status is Status.UNSUPPORTED


def test_an_outcome_has_the_status_of_its_reason():
    assert Outcome(Reason.CORRUPT, tokens=3).status is Status.FALLBACK_REPREFILL
