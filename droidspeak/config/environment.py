"""What `DROIDSPEAK_*` variables say, as pydantic-settings reads them.

    DROIDSPEAK_CODEC=zstd                    a value, as it stands
    DROIDSPEAK_DRIFT='{"window": 64}'        a section or a list, in JSON
    DROIDSPEAK_SERVER__IN_FLIGHT=2GiB        a key of a section; wins over the section as a whole

Names in any case. A variable that is for no key of the top level is somebody else's (`DROIDSPEAK_CONFIG`).
Where there is none, pydantic-settings is not imported: that takes a command longer than all else it does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from droidspeak.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["AsText", "environment_values"]

_PREFIX, _DELIMITER = "DROIDSPEAK_", "__"


class AsText:
    """Marks the type of a list or a section that the environment gives as text, not as JSON."""


def environment_values(schema: type[BaseModel]) -> dict[str, Any]:
    """The tree of values, by the keys of `schema`. Raises `ConfigError`."""
    if not any(_key(name) in schema.model_fields for name in os.environ):
        return {}
    from pydantic_settings import EnvSettingsSource, SettingsError

    class Source(EnvSettingsSource):
        at = ""

        def prepare_field_value(self, field_name: str, *rest: Any) -> Any:
            self.at = field_name
            return super().prepare_field_value(field_name, *rest)

        def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
            if AsText in field.metadata:
                return value
            return super().decode_complex_value(field_name, field, value)

    # It takes any model, whatever its annotation says.
    source = Source(schema, env_prefix=_PREFIX, env_nested_delimiter=_DELIMITER)  # type: ignore[arg-type]
    try:
        return source()
    except SettingsError:
        raise ConfigError(
            f"environment {_PREFIX}{source.at.upper()}, or a key of it: allowed is JSON"
        ) from None


def _key(name: str) -> str:
    """The key of the top level that a variable is for, or nothing."""
    upper = name.upper()
    return upper.removeprefix(_PREFIX).split(_DELIMITER)[0].lower() if upper.startswith(_PREFIX) else ""
