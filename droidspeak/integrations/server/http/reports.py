"""Reports of the engines that use this store; see `droidspeak.connector.reports`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from droidspeak.connector.reports import Report, encoded, fold_reports, parse_report
from droidspeak.errors import StorageError
from droidspeak.integrations.server.http.auth import Access, Needs
from droidspeak.integrations.server.http.listing import LinesResponse
from droidspeak.integrations.server.http.refusals import Reason, Refusal, documented
from droidspeak.storage.reports import MOST_REPORT_BYTES

__all__ = ["router"]

_MOST_KNOWN = 4096

router = APIRouter(tags=["reports"])


@router.get(
    "/v1/reports",
    response_class=LinesResponse,
    responses={
        200: {
            "description": 'One JSON object a line: `{"name": ..., "report": {...}}`.',
            "content": {LinesResponse.media_type: {"schema": {"type": "string"}}},
        },
        **documented(),
    },
)
def list_reports(access: Annotated[Access, Depends(Needs("read"))]) -> LinesResponse:
    """What engines tell of themselves. Those of processes that have ended are summed up in `total`."""
    return LinesResponse(iter(list(_lines(access))))


def _lines(access: Access) -> Iterator[bytes]:
    for name, data in access.store.reports():
        if (report := parse_report(data)) is not None:
            yield json.dumps({"name": name, "report": report.model_dump(mode="json")}).encode() + b"\n"


@router.put(
    "/v1/reports/{id}",
    status_code=204,
    response_class=Response,
    responses=documented(507),
)
def put_report(
    request: Request,
    access: Annotated[Access, Depends(Needs("write"))],
    id: Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="The report's own `id`.")],
    report: Report,
) -> Response:
    """Keep a report, in place of an older one of this id."""
    data = encoded(report)
    if report.id != id:
        raise Refusal(422, Reason.BAD_REQUEST, f"the report is of id {report.id}, not {id}")
    if len(data) > MOST_REPORT_BYTES:
        raise Refusal(
            413, Reason.TOO_LARGE, f"a report of {len(data)} bytes; allowed are {MOST_REPORT_BYTES}"
        )
    if not access.store.put_report(id, data):
        raise Refusal(404, Reason.NOT_FOUND, "no tier of this store keeps reports")
    known: set[tuple[str, str]] = request.app.state.known_reports
    if (access.tenant, id) not in known:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known.add((access.tenant, id))
        # The report is kept; the next one may find the others in order.
        with suppress(StorageError):
            access.store.fold_reports(fold_reports)
    return Response(status_code=204)
