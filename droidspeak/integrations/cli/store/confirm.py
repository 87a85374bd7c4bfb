"""Changes that cannot be taken back need a yes: typed, or given beforehand with `-y`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from droidspeak.errors import Declined

__all__ = ["YesOption", "require_yes"]

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def require_yes(question: str, yes: bool) -> None:
    """Asks on the terminal, on standard error. Raises `Declined`."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Declined(f"{question} Nobody can be asked here; go ahead with -y")
    if not typer.confirm(question, err=True):
        raise Declined("nothing was changed")
