"""Who may do what: tokens name a tenant and scopes.

The gate finds out who calls (`Doorkeeper`), before anything of a body is read; an endpoint says which scope
it needs (`Needs`), and gets the store of the tenant in question.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from droidspeak.config import TokenSettings
from droidspeak.integrations.server.http.refusals import Reason, Refusal
from droidspeak.integrations.server.state import DEFAULT_TENANT
from droidspeak.storage import TieredStore

__all__ = ["Access", "Caller", "Doorkeeper", "Needs", "NeedsDaemon"]

_BEARER = HTTPBearer(
    auto_error=False,
    description="A token of `server.tokens`. Where there are none, nothing needs one (loopback only).",
)


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request."""

    tenant: str
    scopes: frozenset[str]


ANYONE = Caller(DEFAULT_TENANT, frozenset({"read", "write", "admin"}))


class Doorkeeper:
    """Knows the tokens.

    Args:
        tokens: none at all lets everyone in, who must be on this machine.
    """

    def __init__(self, tokens: Sequence[TokenSettings]) -> None:
        self._known = [(token.digest, Caller(token.tenant, frozenset(token.scopes))) for token in tokens]

    def admit(self, authorization: bytes | None, host: bytes | None, *, page: bool = False) -> Caller:
        """Who sends these headers. Raises `Refusal`.

        Args:
            page: what is asked for is the page that only shows, and may be asked for by a browser, with the
                token as a password. A browser would send that along with whatever another site makes it ask:
                no other path takes it.
        """
        if not self._known:
            if host is not None and not _is_local_name(host.decode("latin-1")):
                raise Refusal(403, Reason.FORBIDDEN, "without tokens, Host must be localhost or an address")
            return ANYONE
        scheme, _, told = (authorization or b"").partition(b" ")
        token = told.strip() if scheme.lower() == b"bearer" else None
        if page and scheme.lower() == b"basic":
            token = _password(told.strip())
        caller = None if token is None else self._caller(token)
        if caller is None:
            raise _unknown(page)
        return caller

    def _caller(self, token: bytes) -> Caller | None:
        # All are compared, each in constant time: how long it takes says nothing about the tokens.
        digest = hashlib.sha256(token).digest()
        found = [caller for known, caller in self._known if hmac.compare_digest(known, digest)]
        return found[0] if found else None


def _password(credentials: bytes) -> bytes | None:
    """The password in the credentials of HTTP's basic scheme (RFC 7617); whose it is does not matter."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return None


def _unknown(page: bool) -> Refusal:
    message = "a token is needed: Authorization: Bearer TOKEN"
    if not page:
        return Refusal(401, Reason.UNAUTHORIZED, message, {"WWW-Authenticate": "Bearer"})
    message += "; a browser asks for it: any user name, and the token as password"
    challenge = {"WWW-Authenticate": 'Basic realm="DroidSpeak", charset="UTF-8"'}
    return Refusal(401, Reason.UNAUTHORIZED, message, challenge)


def _is_local_name(host: str) -> bool:
    """Whether it is no name of a web page, which may be made to lead here (DNS rebinding)."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Access:
    """What a request works on."""

    tenant: str
    store: TieredStore


class Needs:
    """A dependency: the store of the tenant that the caller may use with `scope`."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    async def __call__(
        self,
        request: Request,
        _bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        tenant: Annotated[
            str | None,
            Query(max_length=200, description="Another tenant, for `admin` tokens of the default one."),
        ] = None,
    ) -> Access:
        caller: Caller = request.state.caller
        _require(caller, self._scope)
        name = caller.tenant if tenant is None else tenant
        if name != caller.tenant and (caller.tenant != DEFAULT_TENANT or "admin" not in caller.scopes):
            raise Refusal(403, Reason.FORBIDDEN, "the token is not for other tenants")
        store = request.app.state.daemon.stores.get(name)
        if store is None:
            raise Refusal(404, Reason.UNKNOWN_TENANT, f"no tenant {name!r}")
        return Access(name, store)


class NeedsDaemon:
    """A dependency of what is not one tenant's: callers of the default tenant, with `scope`."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    async def __call__(
        self, request: Request, _bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> None:
        caller: Caller = request.state.caller
        _require(caller, self._scope)
        if caller.tenant != DEFAULT_TENANT:
            raise Refusal(403, Reason.FORBIDDEN, "a tenant's token is not for the daemon as a whole")


def _require(caller: Caller, scope: str) -> None:
    if scope not in caller.scopes:
        raise Refusal(403, Reason.FORBIDDEN, f"the token lacks the scope {scope!r}")
