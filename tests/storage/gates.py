"""Tiers that wait for a test, and a look at what is still running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from droidspeak.storage.guard import Limits
from droidspeak.storage.tier import Tier
from droidspeak.storage.wrappers import Call, WrapperTier

__all__ = ["QUICK", "GatedTier", "eventually"]

T = TypeVar("T")
QUICK = Limits(read_deadline=0.2, write_deadline=0.4, cooldown=0.05, max_cooldown=0.2)


class GatedTier(WrapperTier):
    """`tier` whose calls of `operations` wait until `gate` is set, and are counted.

    Attributes:
        entered: set when a call waits.
        calls: method names in the order in which the calls came.
        ended: method names in the order in which the calls ended.
    """

    def __init__(self, tier: Tier, *operations: str, name: str | None = None) -> None:
        super().__init__(tier, name=name)
        self.in_memory = False
        self.operations = set(operations)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.calls: list[str] = []
        self.ended: list[str] = []

    def _around(self, call: Call[T]) -> T:
        self.calls.append(call.operation)
        if call.operation in self.operations:
            self.entered.set()
            self.gate.wait(30)
        try:
            return call.run()
        finally:
            self.ended.append(call.operation)

    def close(self) -> None:
        self._around(Call("close", self.tier.close))


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `condition` comes true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()
