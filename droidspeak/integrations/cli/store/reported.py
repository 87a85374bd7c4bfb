"""What engines have told, of all tiers that a command works on."""

from __future__ import annotations

from collections.abc import Mapping

from droidspeak.connector.reports import Report, read_reports
from droidspeak.errors import DroidSpeakError, StorageError
from droidspeak.integrations.cli.output import note
from droidspeak.integrations.cli.store.target import Target

__all__ = ["fail", "reports_in"]


def reports_in(target: Target) -> tuple[list[Report], dict[str, DroidSpeakError]]:
    """The reports that count, the latest first; and why tiers did not give theirs, by name."""
    documents: list[tuple[str, bytes]] = []
    failed = dict(target.failed)
    for name, tier in target.tiers.items():
        try:
            documents += tier.reports()
        except StorageError as error:
            failed[name] = error
    return read_reports(documents), failed


def fail(failed: Mapping[str, DroidSpeakError]) -> None:
    """Ends with the first failure's own status, and tells the others."""
    errors = list(failed.values())
    for error in errors[1:]:
        note(f"error: {error}")
    if errors:
        raise errors[0]
