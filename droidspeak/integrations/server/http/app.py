"""The application: endpoints, error answers and the gate."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from droidspeak import __version__
from droidspeak.errors import DroidSpeakError
from droidspeak.integrations.server.budget import OverBudget
from droidspeak.integrations.server.http import admin, chunks, health, listing, page, reports
from droidspeak.integrations.server.http.auth import Doorkeeper
from droidspeak.integrations.server.http.gate import Gate
from droidspeak.integrations.server.http.metrics import registry_of
from droidspeak.integrations.server.http.page import PageSource
from droidspeak.integrations.server.http.refusals import answer_refusal
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import Counters

__all__ = ["make_app"]

_DESCRIPTION = """The daemon's chunks, over HTTP.

Every error is `{"error": {"reason": ..., "message": ...}}` with a reason of a closed list. A path under
`/v1/chunks` names a chunk as `SOURCE/SHARD/PREFIX`, the key that the rest of DroidSpeak uses."""


def make_app(state: DaemonState, counters: Counters | None = None) -> FastAPI:
    """The application over `state`, which may still change: stores are looked up at each request.

    Args:
        counters: of the HTTP side; new ones if `None`.

    Attributes of its `state`: `daemon`, `counters` of the HTTP side, and the metrics' `registry`.
    """
    counters = counters or Counters()
    app = FastAPI(
        title="DroidSpeak daemon",
        version=__version__,
        description=_DESCRIPTION,
        openapi_url="/openapi.json",
        # The pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.daemon, app.state.counters = state, counters
    app.state.known_reports, app.state.page = set(), PageSource(state)
    app.state.registry = registry_of(state, counters)
    for part in (health, chunks, listing, admin, reports, page):
        app.include_router(part.router)
    for kind in (HTTPException, RequestValidationError, DroidSpeakError, OverBudget, Exception):
        app.add_exception_handler(kind, answer_refusal)
    app.add_middleware(
        Gate,
        doorkeeper=Doorkeeper(state.settings.server.tokens),
        stall_timeout=state.settings.server.stall_timeout,
        counters=counters,
    )
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
