"""Spans for OpenTelemetry (extra `otel`), where the process that we run in has set it up.

    with span("droidspeak.lookup", {"droidspeak.tokens": 4096}) as found:
        ...
        found.set({"droidspeak.result": "miss"})

Without OpenTelemetry, or without a provider, it does next to nothing: this module imports nothing, for a
process that traces has imported OpenTelemetry long before a request comes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["Attributes", "LongSpan", "Traced", "long_span", "span"]

Attributes = Mapping[str, str | int | float | bool | None]


class Traced(Protocol):
    """A span under way."""

    def set(self, attributes: Attributes) -> None:
        """Sets attributes; those that are `None` are left out."""

    def fail(self, reason: str) -> None:
        """It did not do what it was for; `reason` becomes its status."""


class _Untraced:
    def set(self, attributes: Attributes) -> None: ...

    def fail(self, reason: str) -> None: ...


class _Recording:
    """A span of OpenTelemetry, made the current one while it is entered."""

    def __init__(self, tracer: Tracer, name: str, attributes: Attributes) -> None:
        self._entered = tracer.start_as_current_span(name, attributes=_known(attributes))

    def __enter__(self) -> Self:
        self._span = self._entered.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.__exit__(kind, error, trace)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(_known(attributes))

    def fail(self, reason: str) -> None:
        _fail(self._span, reason)


class LongSpan:
    """A span of what goes on beside other work, from `long_span` to `end`, whatever thread calls that."""

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def end(self, attributes: Attributes, failure: str | None = None) -> None:
        """Ends it. Calling it again does nothing."""
        ended, self._span = self._span, None
        if ended is None:
            return
        ended.set_attributes(_known(attributes))
        if failure is not None:
            _fail(ended, failure)
        ended.end()


_UNTRACED: AbstractContextManager[Traced] = nullcontext(_Untraced())


def span(name: str, attributes: Attributes) -> AbstractContextManager[Traced]:
    """A span around a block; what is raised there is recorded on it.

    Args:
        attributes: those that are `None` are left out.
    """
    tracer = _tracer()
    return _UNTRACED if tracer is None else _Recording(tracer, name, attributes)


def long_span(name: str, attributes: Attributes) -> LongSpan:
    """A span that begins now, under the current one, and does not become the current one itself."""
    tracer = _tracer()
    return LongSpan(None if tracer is None else tracer.start_span(name, attributes=_known(attributes)))


def _tracer() -> Tracer | None:
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    # What the API gives while nobody has set a provider.
    if isinstance(provider, trace.ProxyTracerProvider):
        return None
    tracer: Tracer = provider.get_tracer("droidspeak")
    return tracer


def _known(attributes: Attributes) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in attributes.items() if value is not None}


def _fail(span: Span, reason: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, reason))
