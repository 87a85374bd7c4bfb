"""Liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from droidspeak.errors import StorageError
from droidspeak.integrations.server.http.auth import NeedsDaemon
from droidspeak.integrations.server.http.refusals import (
    RETRY_AFTER,
    ErrorAnswer,
    Reason,
    Refusal,
    documented,
)
from droidspeak.integrations.server.http.schemas import HealthAnswer
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import ChunkKey, SourceId, TieredStore

__all__ = ["router"]

# Of no chunk: a look for it costs a tier little, and tells whether it answers.
_PROBE = ChunkKey(SourceId("0" * 64), "0of1", "0" * 64)

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> HealthAnswer:
    """Whether the process lives."""
    return HealthAnswer(status="alive")


@router.get(
    "/readyz",
    responses={503: {"model": ErrorAnswer, "description": "It drains, or no tier of a store answers."}},
)
def readyz(request: Request) -> HealthAnswer:
    """Whether requests are served: not while it starts or drains, nor when a store has no tier left."""
    daemon: DaemonState = request.app.state.daemon
    if not daemon.ready.is_set():
        raise Refusal(503, Reason.UNAVAILABLE, "starting or draining", RETRY_AFTER)
    silent = [name or "default" for name, store in daemon.stores.items() if not _answers(store)]
    if silent:
        raise Refusal(503, Reason.UNAVAILABLE, f"no tier answers of: {', '.join(silent)}", RETRY_AFTER)
    return HealthAnswer(status="ready")


def _answers(store: TieredStore) -> bool:
    try:
        store.head(_PROBE)
    except StorageError:
        return False
    return True


@router.get(
    "/metrics",
    dependencies=[Depends(NeedsDaemon("read"))],
    response_class=Response,
    responses={
        200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **documented(),
    },
)
def metrics(request: Request) -> Response:
    """What Prometheus scrapes; the names are in docs/metrics.md."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
