"""`droidspeak doctor`: whether this machine and its configuration can do what they are meant to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droidspeak.config import load_settings
from droidspeak.config.provenance import Setting, sourced
from droidspeak.config.settings import configuration_file
from droidspeak.errors import ConfigError
from droidspeak.integrations.cli.checks import Check, Verdict, machine, policies, tier_checks
from droidspeak.integrations.cli.config import ConfigFileOption, setting_rows
from droidspeak.integrations.cli.output import Format, FormatOption, show_document

__all__ = ["doctor"]

_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def doctor(
    write: Annotated[
        bool, typer.Option("--write", help="Write, read and delete a small chunk in each tier.")
    ] = False,
    config: ConfigFileOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Check environment, extras, GPU, configuration, policies, tiers, room and clocks.

    Changes nothing without --write. Exit status 3 if a check fails.
    """
    settings: list[Setting] = []
    checks = [*machine(), *_of_configuration(config, settings, write=write)]
    document: dict[str, Any] = {
        "version": 1,
        "ok": all(check.verdict is not Verdict.FAIL for check in checks),
        "checks": [asdict(check) for check in checks],
        "settings": list(setting_rows(settings)),
    }
    show_document(format, document, lambda: _show(checks, settings))
    if not document["ok"]:
        raise typer.Exit(3)


def _of_configuration(config: Path | None, found: list[Setting], *, write: bool) -> Iterator[Check]:
    try:
        settings = load_settings(config)
    except ConfigError as error:
        yield Check("configuration", Verdict.FAIL, str(error), "correct it: droidspeak config check")
        return
    found += sourced(settings, config)
    path = configuration_file(config)
    yield Check("configuration", Verdict.OK, str(path) if path else "no file; defaults and environment")
    yield from policies(settings)
    for description in settings.tiers:
        yield from tier_checks(description, write=write)


def _show(checks: list[Check], settings: list[Setting]) -> None:
    console = Console()
    # A pipe has no width of its own.
    console = console if console.is_terminal else Console(width=160)
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False, title_justify="left")
    for check in checks:
        verdict = Text(check.verdict.value, style=_COLOURS[check.verdict])
        table.add_row(Text(check.name), verdict, Text(check.found), Text(check.advice))
    console.print(table)
    changed = [setting for setting in settings if setting.source != "default"]
    if changed:
        told = Table("setting", "value", "source", box=None, pad_edge=False)
        for setting in changed:
            told.add_row(*map(Text, (setting.key, str(setting.value), setting.source)))
        console.print()
        console.print(told)
