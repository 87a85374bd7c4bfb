"""Where each setting comes from.

    for setting in resolved(file): print(setting.key, setting.value, setting.source)

A setting is one value of the tree: `server.listen`, `limits.s3.read_deadline`; a list counts as one. Its
source is `default`, `file PATH`, `environment NAME` or `argument`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from droidspeak.config.environment import environment_values
from droidspeak.config.masking import masked
from droidspeak.config.settings import Settings, configuration_file, load_settings, read_yaml

__all__ = ["Setting", "resolved", "sourced"]

_PREFIX, _DELIMITER = "DROIDSPEAK_", "__"


@dataclass(frozen=True)
class Setting:
    """One value as it was resolved, in JSON's types; secrets are `**********`."""

    key: str
    value: Any
    source: str


def resolved(file: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> list[Setting]:
    """All settings with their sources. Arguments and errors as of `load_settings`."""
    return sourced(load_settings(file, overrides), file, overrides)


def sourced(
    settings: Settings, file: Path | str | None = None, overrides: Mapping[str, Any] | None = None
) -> list[Setting]:
    """As `resolved`, of `settings` that were loaded with the same arguments."""
    path = configuration_file(file)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    layers = _Layers(given, environment_values(Settings), path, read_yaml(path) if path else {})
    values = masked(settings.model_dump(mode="json"))
    return [Setting(".".join(where), value, layers.source(where)) for where, value in _leaves(values)]


@dataclass(frozen=True)
class _Layers:
    """What each source says, the winning ones first."""

    arguments: Mapping[str, Any]
    environment: Mapping[str, Any]
    path: Path | None
    file: Mapping[str, Any]

    def source(self, where: tuple[str, ...]) -> str:
        if _says(self.arguments, where):
            return "argument"
        if _says(self.environment, where):
            return f"environment {_variable(where)}"
        return f"file {self.path}" if _says(self.file, where) else "default"


def _says(layer: Any, where: tuple[str, ...]) -> bool:
    """Whether `layer` gives the value at `where`, or one of a place above it as a whole."""
    for part in where:
        if not isinstance(layer, Mapping):
            return True
        if part not in layer:
            return False
        layer = layer[part]
    return True


def _variable(where: tuple[str, ...]) -> str:
    """The environment variable that gives `where`, or the nearest place above it."""
    names = {name.upper(): name for name in os.environ}
    for length in range(len(where), 0, -1):
        name = _PREFIX + _DELIMITER.join(where[:length]).upper()
        if name in names:
            return names[name]
    return f"{_PREFIX}{where[0].upper()}"


def _leaves(value: Mapping[str, Any], where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, part in value.items():
        place = (*where, key)
        if isinstance(part, Mapping) and part.keys() == {"host", "port"}:
            yield place, _address(part["host"], part["port"])
        elif isinstance(part, Mapping) and part:
            yield from _leaves(part, place)
        else:
            yield place, part


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
