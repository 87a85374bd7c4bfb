"""The connector: lookup, layer stream, saving, and a status for every request.

The names are imported when they are first used: the configuration checks a connector's options and shall
not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from droidspeak.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "connector": ("Connector",),
        "match": ("Match",),
        "options": ("ConnectorOptions",),
        "saver": ("SaveSession",),
        "status": ("Outcome", "Reason", "Status"),
        "stream": ("LayerStream",),
    },
)
