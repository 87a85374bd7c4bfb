"""The HTTP side of the daemon: health, metrics, chunks and administration. See docs/http-api.md.

serving      uvicorn in a thread of its own, and its connections' bounds (`connection`)
gate         who is it (`auth`), how much may come in, what is counted
app          the endpoints: `chunks`, `listing`, `admin`, `health`, `reports`, and `page`, the status page
bodies       payloads in and out, inside the budget of bytes, without joining copies
"""

from __future__ import annotations

from droidspeak.errors import MissingExtra

try:
    from droidspeak.integrations.server.http.app import make_app
    from droidspeak.integrations.server.http.serving import HttpServer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in (
        "fastapi",
        "httptools",
        "jinja2",
        "prometheus_client",
        "starlette",
        "uvicorn",
    ):
        raise MissingExtra("HTTP side", "server") from None
    raise

__all__ = ["HttpServer", "make_app"]
