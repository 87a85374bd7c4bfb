"""Single flight: callers that want the same thing at the same time share one fetch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from droidspeak.errors import StorageError

__all__ = ["SingleFlight"]

T = TypeVar("T")


@dataclass
class _Flight(Generic[T]):
    landed: threading.Event = field(default_factory=threading.Event)
    joined: int = 0
    shared: list[T] = field(default_factory=list)
    error: StorageError | None = None


class SingleFlight(Generic[T]):
    """The first caller of a key fetches; those who come before it has landed get a shared copy.

    Args:
        share: makes the value that joiners get, called once and before the first caller returns:
            the first caller may own the memory of its value and change it afterwards.
    """

    def __init__(self, share: Callable[[T], T]) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._flights: dict[tuple[Hashable, Hashable], _Flight[T]] = {}

    def fetch(self, key: Hashable, part: Hashable, call: Callable[[], T]) -> tuple[T, bool]:
        """The value of `part` of `key`, and whether it was shared by another caller's fetch.

        Raises:
            StorageError: the fetch failed, for all of its callers. Any other error is the first
                caller's own, and the others fetch for themselves.
        """
        while True:
            flight, first = self._board((key, part))
            if first:
                return self._fly((key, part), flight, call), False
            flight.landed.wait()
            if flight.error is not None:
                raise flight.error
            if flight.shared:
                return flight.shared[0], True

    def forget(self, key: Hashable) -> None:
        """`key` has changed: whoever comes from now on does not join a fetch that began before."""
        with self._lock:
            for flight in [flight for flight in self._flights if flight[0] == key]:
                del self._flights[flight]

    def _board(self, name: tuple[Hashable, Hashable]) -> tuple[_Flight[T], bool]:
        with self._lock:
            flight = self._flights.get(name)
            if flight is not None:
                flight.joined += 1
                return flight, False
            flight = self._flights[name] = _Flight()
            return flight, True

    def _fly(self, name: tuple[Hashable, Hashable], flight: _Flight[T], call: Callable[[], T]) -> T:
        try:
            value = call()
            if self._close(name, flight):
                flight.shared.append(self._share(value))
            return value
        except StorageError as error:
            # Only for others: a kept error keeps what its traceback knows, the caller's memory too.
            if self._close(name, flight):
                flight.error = error
            raise
        finally:
            self._close(name, flight)
            flight.landed.set()

    def _close(self, name: tuple[Hashable, Hashable], flight: _Flight[T]) -> bool:
        """From now on nobody joins; whether anybody has."""
        with self._lock:
            if self._flights.get(name) is flight:
                del self._flights[name]
            return flight.joined > 0
