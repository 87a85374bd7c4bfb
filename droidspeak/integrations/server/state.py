"""What the two sides of the daemon share: the stores, and what is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from droidspeak.config import Settings
from droidspeak.integrations.server.budget import BytesBudget
from droidspeak.storage import Counters, TieredStore

__all__ = ["DEFAULT_TENANT", "DaemonState"]

DEFAULT_TENANT = ""


@dataclass
class DaemonState:
    """One running daemon.

    Attributes:
        stores: by tenant; the default tenant's name is empty.
        counters: of the `lm://` side: `requests` by command, `refused` by reason, `closed` by reason,
            `received_bytes`, `sent_bytes`, `connections`.
        ready: set while requests are served; cleared when the daemon drains.
        connections: open `lm://` connections now.
        budget: of bytes of payloads under way, for both sides together.
    """

    settings: Settings
    stores: Mapping[str, TieredStore]
    counters: Counters = field(default_factory=Counters)
    ready: threading.Event = field(default_factory=threading.Event)
    connections: Callable[[], int] = lambda: 0
    budget: BytesBudget = field(init=False)

    def __post_init__(self) -> None:
        self.budget = BytesBudget(self.settings.server.in_flight)

    def in_flight(self) -> int:
        """Bytes of payloads that are being received or sent now."""
        return self.budget.held
