"""Single flight: callers that want the same thing at the same time share one fetch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["SingleFlight"]

T = TypeVar("T")


@dataclass
class _Flight(Generic[T]):
    landed: threading.Event = field(default_factory=threading.Event)
    joined: int = 0
    value: T | None = None
    error: BaseException | None = None


class SingleFlight(Generic[T]):
    """The first caller of a key fetches; those who come before it has landed get a shared copy.

    Args:
        share: makes the value that joiners get, called once and before the first caller returns:
            the first caller may own the memory of its value and change it afterwards.
    """

    def __init__(self, share: Callable[[T], T]) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._flights: dict[Hashable, _Flight[T]] = {}

    def fetch(self, key: Hashable, call: Callable[[], T]) -> tuple[T, bool]:
        """The value, and whether it was shared by another caller's fetch.

        Raises:
            Whatever `call` raised, for all callers of the flight.
        """
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                flight.joined += 1
            else:
                mine = self._flights[key] = _Flight()
        if flight is not None:
            flight.landed.wait()
            if flight.error is not None:
                raise flight.error
            return flight.value, True  # type: ignore[return-value]
        try:
            value = call()
            with self._lock:
                self._flights.pop(key)
            if mine.joined:
                mine.value = self._share(value)
        except BaseException as error:
            mine.error = error
            raise
        finally:
            with self._lock:
                if self._flights.get(key) is mine:
                    del self._flights[key]
            mine.landed.set()
        return value, False
