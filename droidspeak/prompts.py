"""Prompt files: one JSON object a line, `{"id", "prefix", "question", "answer"}`.

Prefix, question and answer are texts, or all three lists of token ids. Rows with the same prefix share
its cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from droidspeak.errors import PromptError

__all__ = ["Prompt", "load_prompts"]

_FIELDS = ("prefix", "question", "answer")


@dataclass(frozen=True)
class Prompt:
    """One question about one prefix; texts, or token ids."""

    id: str
    prefix: str | tuple[int, ...]
    question: str | tuple[int, ...]
    answer: str | tuple[int, ...]

    @property
    def is_text(self) -> bool:
        return isinstance(self.prefix, str)


def load_prompts(path: Path | str) -> list[Prompt]:
    """All rows of a prompt file.

    Raises:
        PromptError: naming file, line, what is wrong and what is allowed.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompt file {path} cannot be read: {error}") from None
    prompts = [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PromptError(f"prompt file {path} holds no prompts")
    if len({prompt.is_text for prompt in prompts}) > 1:
        raise PromptError(f"prompt file {path} mixes texts and token ids; one kind is allowed")
    _refuse_duplicates(prompts, path)
    return prompts


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError:
        raise PromptError(f"{where}: not JSON; allowed is one object a line") from None
    missing = [field for field in ("id", *_FIELDS) if not isinstance(row, dict) or field not in row]
    if missing:
        raise PromptError(f"{where}: lacks {', '.join(missing)}; needed are id, prefix, question, answer")
    values = [_value(row[field], f"{where}: {field}") for field in _FIELDS]
    if len({isinstance(value, str) for value in values}) > 1:
        raise PromptError(f"{where}: mixes texts and token ids; one kind is allowed")
    return Prompt(str(row["id"]), *values)


def _value(value: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Sequence) and value and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise PromptError(f"{where} must be a text or a list of token ids, and not empty")


def _refuse_duplicates(prompts: list[Prompt], path: Path | str) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"prompt file {path}: id {prompt.id!r} stands twice")
        seen.add(prompt.id)
