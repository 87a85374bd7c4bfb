"""The status page at `/`: made here, whole, so that it works with scripts off and asks no other host.

A small script of its own brings the figures up to date; the content security policy names it, and the style
sheet, by their digests, and forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Depends, Request, Response

from droidspeak import __version__
from droidspeak.integrations.server.http.auth import Access, Needs
from droidspeak.integrations.server.http.frontier import Frontier
from droidspeak.integrations.server.http.pagedata import PageSource
from droidspeak.integrations.server.http.refusals import documented

__all__ = ["PageSource", "router"]

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FOLDER / "page.js").read_text(encoding="utf-8")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

router = APIRouter(tags=["status page"])


@router.get(
    "/",
    response_class=Response,
    responses={
        200: {"description": "A page for people.", "content": {"text/html": {"schema": {"type": "string"}}}},
        **documented(),
    },
)
def status_page(request: Request, access: Annotated[Access, Depends(Needs("read"))]) -> Response:
    """Tiers, models, sharing, policies, drift and engines. A browser may give the token as a password."""
    source: PageSource = request.app.state.page
    content = source.content(access)
    frontiers = [Frontier.of(artifact) for artifact in content.policies.found] if content.policies else []
    page = _TEMPLATE.render(
        page=content, frontiers=frontiers, version=__version__, style=_STYLE, script=_SCRIPT
    )
    return Response(page, media_type="text/html", headers=_HEADERS)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_digest(_STYLE)}'; script-src 'sha256-{_digest(_SCRIPT)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


# How values are read


def nbytes(value: float) -> str:
    """`1.5 GiB`."""
    power = 0
    while value >= 1024 and power < len(_UNITS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.0f} B" if power == 0 else f"{value:.3g} {_UNITS[power]}"


def count(value: float) -> str:
    """`1,234`, and from a million on `1.23 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """`12 %`; nothing of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def age(time: timedelta) -> str:
    """`3 s`, `5 min`, `2 h`, `4 d`."""
    seconds = int(time.total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Any] = {"nbytes": nbytes, "count": count, "age": age}
    environment.filters.update(filters)
    environment.globals["share"] = share
    return environment.from_string((_FOLDER / "page.html.jinja").read_text(encoding="utf-8"))


_TEMPLATE = _template()
