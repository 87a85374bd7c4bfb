"""What source models are called: by the policy files that speak of them, else by their first digits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from droidspeak.errors import PolicyError

__all__ = ["names_in", "short"]

_DIGITS = 12


def names_in(folder: Path | None) -> dict[str, str]:
    """The names that the policy files of `folder` give to source ids; of several, the first file's.

    Only names are wanted, so a file that is no sound policy is passed over in silence.

    Raises:
        PolicyError: the folder cannot be read.
    """
    names: dict[str, str] = {}
    try:
        paths = sorted(folder.glob("[!.]*.json")) if folder else []
        if folder and not folder.is_dir():
            raise NotADirectoryError(20, "is no folder")
    except OSError as error:
        raise PolicyError(f"policies {folder} cannot be read: {error.strerror}") from None
    for path in paths:
        for source, name in _sides(path):
            names.setdefault(source, name)
    return names


def _sides(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(path.read_bytes())
        sides: list[Any] = [content["sender"], content["receiver"]]
        named = [(side["source_id"], side["name"]) for side in sides]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [(source, name) for source, name in named if isinstance(source, str) and isinstance(name, str)]


def short(source: str, names: Mapping[str, str]) -> str:
    """How a table shows a source model."""
    return names.get(source) or source[:_DIGITS]
