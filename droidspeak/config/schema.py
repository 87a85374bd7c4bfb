"""The JSON Schema of a configuration file, for editors and for checks where DroidSpeak is not installed."""

from __future__ import annotations

from typing import Any

from droidspeak.config.settings import Settings

__all__ = ["settings_schema"]


def settings_schema() -> dict[str, Any]:
    """Of the YAML file. `load_settings` checks more: which values must fit each other."""
    schema = Settings.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "DroidSpeak configuration",
        "description": "docs/configuration.md",
    }
