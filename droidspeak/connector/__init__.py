"""The connector: lookup, layer stream, saving, and a status for every request."""

from droidspeak.connector.connector import Connector, ConnectorOptions
from droidspeak.connector.match import Match
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
