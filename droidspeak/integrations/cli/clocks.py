"""How far another machine's clock is from ours, by the `Date` of an HTTP answer."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

__all__ = ["clock_of"]

_PATIENCE = 5.0


def clock_of(options: Mapping[str, Any]) -> Callable[[], float] | None:
    """Asks how many seconds the clock behind a tier is ahead; `None` for tiers of this machine.

    Args:
        options: as of `droidspeak.storage.urls.checked_options`.

    The call raises `OSError` or `ValueError` where there is no such answer.
    """
    if options["type"] == "droidspeak":
        ca = options.get("ca")
        tls = ssl.create_default_context(cafile=ca) if options.get("tls") else None
        return partial(_ahead, options["host"], options.get("port", 65433), "/healthz", tls)
    if options["type"] == "s3":
        place = urlsplit(options.get("endpoint") or "https://s3.amazonaws.com")
        secure = ssl.create_default_context() if place.scheme == "https" else None
        return partial(_ahead, place.hostname or "", place.port, "/", secure)
    return None


def _ahead(host: str, port: int | None, path: str, tls: ssl.SSLContext | None) -> float:
    connection = (
        http.client.HTTPSConnection(host, port, timeout=_PATIENCE, context=tls)
        if tls
        else http.client.HTTPConnection(host, port, timeout=_PATIENCE)
    )
    try:
        began = time.time()
        connection.request("GET", path)
        date = connection.getresponse().getheader("Date")
        ended = time.time()
    except http.client.HTTPException as error:
        raise ValueError(f"no HTTP answer: {error}") from None
    finally:
        connection.close()
    if date is None:
        raise ValueError("the answer has no date")
    # The header has whole seconds, cut off.
    return parsedate_to_datetime(date).timestamp() + 0.5 - (began + ended) / 2
