"""The connector: lookup, layer stream, saving, and a status for every request.

The names are imported when they are first used: the configuration checks a connector's options and shall
not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from droidspeak.connector.connector import Connector
    from droidspeak.connector.match import Match
    from droidspeak.connector.options import ConnectorOptions
    from droidspeak.connector.saver import SaveSession
    from droidspeak.connector.status import Outcome, Reason, Status
    from droidspeak.connector.stream import LayerStream

__all__ = [
    "Connector",
    "ConnectorOptions",
    "LayerStream",
    "Match",
    "Outcome",
    "Reason",
    "SaveSession",
    "Status",
]

_MODULE_OF = {
    "Connector": "connector",
    "ConnectorOptions": "options",
    "LayerStream": "stream",
    "Match": "match",
    "Outcome": "status",
    "Reason": "status",
    "SaveSession": "saver",
    "Status": "status",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
