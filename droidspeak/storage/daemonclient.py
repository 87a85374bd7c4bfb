"""HTTP to one DroidSpeak daemon: requests, tries, and what its answers mean in the error tree.

    2xx                          the answer
    404 not_found                `NotThere`
    404 corrupt, 422 not_a_chunk `ChunkCorrupt`
    412 changed                  `Changed`: another version than the one that was asked for
    413, 507                     `TierFull`
    504, silence                 `TierTimeout`
    403 forbidden                `Forbidden`, which is `TierUnavailable`
    no connection, any other     `TierUnavailable`

An answer counts only if it has the shape of the daemon's own: another HTTP server that says 404 to
everything is unavailable, not a cache without chunks.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from droidspeak.errors import (
    ChunkCorrupt,
    ConfigError,
    MissingExtra,
    StorageError,
    TierFull,
    TierTimeout,
    TierUnavailable,
)

try:
    import urllib3
    from urllib3.exceptions import (
        EmptyPoolError,
        HTTPError,
        IncompleteRead,
        NewConnectionError,
        ProtocolError,
    )
    from urllib3.exceptions import TimeoutError as SilenceError
except ImportError:
    raise MissingExtra("remote tier", "remote") from None

__all__ = ["Changed", "DaemonClient", "Forbidden", "NotThere", "fill"]

_ATTEMPTS = 3
_MESSAGE_BYTES = 64 << 10
_JSON_BYTES = 16 << 20
_PIECE = 1 << 20
_TOKEN = re.compile(r"[!-~]+")
T = TypeVar("T")


class NotThere(Exception):
    """The daemon holds no such chunk."""


class Changed(Exception):
    """The version that was asked for has been replaced."""


class Forbidden(TierUnavailable):
    """The token may not do this."""


_MEANINGS: Mapping[str, type[Exception]] = {
    "not_found": NotThere,
    "changed": Changed,
    "corrupt": ChunkCorrupt,
    "not_a_chunk": ChunkCorrupt,
    "too_large": TierFull,
    "full": TierFull,
    "timeout": TierTimeout,
    "forbidden": Forbidden,
}


class DaemonClient:
    """Requests to the daemon at `host`:`port`, from any thread. A forked process opens its own.

    Args:
        tls: speak HTTPS; the daemon's certificate must be for `host`.
        ca: PEM file of the authorities that may have signed it; the system's if `None`.
        token: sent with each request.
        tenant: whose chunks; the token's own tenant if `None`.
        timeout: seconds to connect, and seconds of silence, before a request is given up.
        connections: open at a time; further requests wait `timeout` s for one.

    Raises:
        ConfigError: a token that no header can carry, or authorities that cannot be read.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: bool,
        ca: Path | None,
        token: str | None,
        tenant: str | None,
        timeout: float,
        connections: int,
    ) -> None:
        shown = f"[{host}]" if ":" in host else host
        self.where = f"daemon at {'https' if tls else 'http'}://{shown}:{port}"
        self._host, self._port = host, port
        self._timeout, self._connections = timeout, connections
        self._context = _context(ca) if tls else None
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "droidspeak"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {self._sound(token)}"
        self._query = "" if tenant is None else f"tenant={quote(tenant, safe='')}"
        self._process = os.getpid()
        self._pool = self._connect()

    def call(self, exchange: Callable[[], T], *, attempts: int = _ATTEMPTS) -> T:
        """What `exchange` gives, made again when the connection breaks.

        Raises:
            TierUnavailable, TierTimeout: as the module says, in one line.
        """
        if os.getpid() != self._process:
            raise TierUnavailable(f"{self.where}: opened before this process was forked; open it anew")
        for left in reversed(range(attempts)):
            try:
                return exchange()
            except (ProtocolError, IncompleteRead) as error:
                # What timed out in the middle of sending looks like a broken connection.
                if not left or isinstance(_cause(error), TimeoutError):
                    self._fail(error)
            except HTTPError as error:
                self._fail(error)
        raise AssertionError("no attempts")

    @contextmanager
    def answer(
        self,
        method: str,
        path: str,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | Sequence[memoryview] | None = None,
        pool: urllib3.HTTPConnectionPool | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer, if it is a success, to be read inside; a connection that was not read to the end
        is not used again. Raises as the module says, and what urllib3 raises: see `call`."""
        query = "&".join(part for part in (query, self._query) if part)
        answer = (pool or self._pool).urlopen(
            method,
            f"{path}?{query}" if query else path,
            body=body,  # type: ignore[arg-type] # any iterable of buffers may be sent
            headers={**self._headers, **(headers or {})},
            retries=False,
            redirect=False,
            pool_timeout=self._timeout,  # type: ignore[arg-type] # seconds, whole or not
            preload_content=False,
            decode_content=False,
        )
        try:
            if not 200 <= answer.status < 300:
                self._refuse(answer)
            yield answer
        finally:
            answer.close()
            answer.release_conn()

    def done(self, method: str, path: str, **options: Any) -> None:
        """Makes a request whose answer says nothing."""

        def exchange() -> None:
            with self.answer(method, path, **options) as answer:
                answer.read(1)
                if answer.status != 204:
                    self.foreign(f"status {answer.status}")

        self.call(exchange)

    def json(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        attempts: int = _ATTEMPTS,
        of_chunk: bool = False,
    ) -> Any:
        """The JSON that answers a request with the JSON `value`.

        Args:
            of_chunk: `path` is one of a chunk, which need not be there.
        """
        body = None if value is None else json.dumps(value).encode()
        headers = {"Content-Type": "application/json"} if body else {}

        def exchange() -> bytes:
            with self.answer(method, path, headers=headers, body=body) as answer:
                return answer.read(_JSON_BYTES)

        with nullcontext() if of_chunk else self._known(path):
            data = self.call(exchange, attempts=attempts)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            self.foreign("no JSON")

    def lines(self, path: str, query: str, *, longest: int = _MESSAGE_BYTES) -> Iterator[bytes]:
        """The lines of an answer, on a connection of its own: who reads them may take a while."""
        with self._known(path), closing(self._connect()) as pool:
            try:
                with self.answer("GET", path, query=query, pool=pool) as answer:
                    yield from self._split(answer, longest)
            except HTTPError as error:
                self._fail(error)

    def _split(self, answer: urllib3.BaseHTTPResponse, longest: int) -> Iterator[bytes]:
        rest = b""
        for piece in answer.stream(_MESSAGE_BYTES, decode_content=False):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            if len(rest) > longest:
                self.foreign("a line without end")
        if rest:
            yield rest

    @contextmanager
    def _known(self, path: str) -> Iterator[None]:
        """A daemon has all of `path`."""
        try:
            yield
        except (NotThere, Changed) as error:
            self.foreign(f"{path} is answered with: {error}")

    def foreign(self, what: str) -> NoReturn:
        """Raises `TierUnavailable`: `what` is no answer of this protocol."""
        raise TierUnavailable(f"{self.where}: {what}, which is no answer of a DroidSpeak daemon")

    def close(self) -> None:
        """Closes the connections."""
        self._pool.close()

    def _sound(self, token: str) -> str:
        if not _TOKEN.fullmatch(token):
            raise ConfigError(f"{self.where}: the token is empty, or has more than printable ASCII in it")
        return token

    def _connect(self) -> urllib3.HTTPConnectionPool:
        kind: Any = urllib3.HTTPConnectionPool
        options: dict[str, Any] = {}
        if self._context:
            kind, options = urllib3.HTTPSConnectionPool, {"ssl_context": self._context}
        pool: urllib3.HTTPConnectionPool = kind(
            self._host,
            self._port,
            timeout=urllib3.Timeout(connect=self._timeout, read=self._timeout),
            maxsize=self._connections,
            block=True,
            **options,
        )
        return pool

    def _refuse(self, answer: urllib3.BaseHTTPResponse) -> NoReturn:
        try:
            error = json.loads(answer.read(_MESSAGE_BYTES))["error"]
            reason, message = error["reason"], " ".join(error["message"].split())
            meaning = _MEANINGS.get(reason, TierUnavailable)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.foreign(f"status {answer.status}")
        raise meaning(f"{self.where}: {message[:500]} ({reason})")

    def _fail(self, error: HTTPError) -> NoReturn:
        cause = _cause(error)
        silent = isinstance(error, SilenceError | EmptyPoolError) and not isinstance(
            error, NewConnectionError
        )
        kind: type[StorageError] = TierUnavailable
        told = " ".join(str(getattr(cause, "strerror", None) or cause).split())
        if silent or isinstance(cause, TimeoutError):
            kind, told = TierTimeout, f"no answer within {self._timeout:g} s"
        raise kind(f"{self.where}: {told}") from error


def fill(target: memoryview, answer: urllib3.BaseHTTPResponse) -> None:
    """Fills `target` with the next bytes of `answer`; for use inside an exchange, see `DaemonClient.call`."""
    # In pieces that stay in the core's cache between the socket and their place.
    for start in range(0, len(target), _PIECE):
        piece = target[start : start + _PIECE]
        if answer.readinto(piece) != len(piece):
            raise ProtocolError("the answer ends early")


def _cause(error: Exception) -> BaseException:
    """What urllib3 has wrapped into `error`."""
    inner = [part for part in (error.__cause__, *error.args) if isinstance(part, Exception)]
    return inner[0] if inner else error


def _context(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ca {ca}: {getattr(error, 'strerror', None) or error}") from None
