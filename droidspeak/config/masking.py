"""Settings as they may be shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droidspeak.storage.urls import without_secrets

__all__ = ["HIDDEN", "masked"]

HIDDEN = "**********"
_SECRETS = frozenset({"salt", "token", "sha256", "password", "secret"})


def masked(value: Any) -> Any:
    """`value`, made of mappings and lists, with secrets that are there shown as `**********`."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if key in _SECRETS and part else masked(part) for key, part in value.items()}
    if isinstance(value, str):
        return without_secrets(value) if "://" in value else value
    return [masked(part) for part in value] if isinstance(value, list | tuple) else value
