"""`droidspeak config`: the settings as resolved, whether a file is right, and what may stand in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from droidspeak.config import load_settings
from droidspeak.config.provenance import Setting, resolved
from droidspeak.config.schema import settings_schema
from droidspeak.config.settings import Settings, configuration_file
from droidspeak.integrations.cli.output import (
    Column,
    Format,
    FormatOption,
    show_document,
    show_json,
    show_rows,
)
from droidspeak.storage.urls import checked_options

__all__ = ["ConfigFileOption", "check", "schema", "setting_rows", "show"]

ConfigFileOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file; DROIDSPEAK_CONFIG if not given.")
]


def show(
    sources: Annotated[bool, typer.Option("--sources", help="Also where each value comes from.")] = False,
    config: ConfigFileOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show all settings as resolved from defaults, file and environment. Secrets are masked."""
    columns = [Column("key", "setting"), Column("value", "value", _text)]
    if sources:
        columns.append(Column("source", "source"))
    show_rows(format, setting_rows(resolved(config)), columns, name="settings")


def setting_rows(settings: list[Setting]) -> Iterator[dict[str, Any]]:
    """Settings as rows: key, value, source."""
    return ({"key": setting.key, "value": setting.value, "source": setting.source} for setting in settings)


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def check(
    file: Annotated[
        Path | None, typer.Argument(help="YAML file; DROIDSPEAK_CONFIG if not given.", show_default=False)
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Check a configuration, with the environment, and open nothing. Exit status 2 if it is wrong."""
    settings = load_settings(file)
    _check_tiers(settings)
    path = configuration_file(file)
    content = {"version": 1, "ok": True, "file": None if path is None else str(path)}
    show_document(format, content, lambda: print(f"{path or 'no file; defaults and environment'}: ok"))


def _check_tiers(settings: Settings) -> None:
    """Reads every tier's options. Raises `ConfigError`."""
    tenants = settings.server.tenants.values()
    for description in [*settings.tiers, *(tier for tenant in tenants for tier in tenant.tiers)]:
        checked_options(description)


def schema() -> None:
    """Print the JSON Schema of a configuration file."""
    show_json(settings_schema())
