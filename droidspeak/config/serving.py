"""The `server` section: what the daemon listens on, whom it lets in, and what it bounds.

server:
  listen: 127.0.0.1:65432
  http: 127.0.0.1:65433
  tokens:
    - {name: engines, sha256: 9f86d0..., scopes: [read, write]}
  tenants:
    acme: {tiers: ["cpu://?capacity=2GiB"], listen: "127.0.0.1:65440"}
"""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from droidspeak.config.environment import AsText
from droidspeak.errors import ConfigError
from droidspeak.storage.urls import parse_size

__all__ = ["Address", "ServerSettings", "TenantSettings", "TlsSettings", "TokenSettings"]

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_LENGTH_LIMIT = 2**31 - 1
Scope = Literal["read", "write", "admin"]


class Address(BaseModel):
    """A host and a port; port 0 is any free one."""

    model_config = _FROZEN

    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65535)

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address in `"host:port"` or `"[v6]:port"`. Raises `ConfigError`."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or not host or int(port) > 65535:
            raise ConfigError(f"not an address: {text!r}; allowed is HOST:PORT with a port up to 65535")
        return cls(host=host.removeprefix("[").removesuffix("]"), port=int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(value: Any) -> Any:
    return Address.parse(value) if isinstance(value, str) else value


def _size(value: Any) -> int:
    size = parse_size(value)
    if size == 0:
        raise ConfigError("allowed are sizes above 0")
    return size


ListenAddress = Annotated[Address, AsText, BeforeValidator(_address, json_schema_input_type=Address | str)]
Size = Annotated[int, BeforeValidator(_size, json_schema_input_type=int | str)]
TierList = Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)]


class TokenSettings(BaseModel):
    """Who may use the HTTP side, and for what.

    Attributes:
        name: for logs; the token itself is never shown.
        token: the secret, or
        sha256: its SHA-256 in hex, so that the file holds no secret.
        scopes: `read` to look, `write` to change chunks, `admin` for eviction and configuration.
        tenant: the namespace that the token is for; empty is the default one.
    """

    model_config = _FROZEN

    name: str = Field(min_length=1)
    token: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(default=("read",), min_length=1)
    tenant: str = ""

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("allowed is exactly one of token and sha256")
        if self.token is not None and len(self.token.get_secret_value()) < 16:
            raise ValueError("allowed are tokens of 16 characters or more")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token."""
        if self.token is not None:
            return hashlib.sha256(self.token.get_secret_value().encode()).digest()
        return bytes.fromhex(self.sha256 or "")


class TlsSettings(BaseModel):
    """PEM files for both ports; with `client_ca`, clients must show a certificate it has signed."""

    model_config = _FROZEN

    certificate: Path
    key: Path
    client_ca: Path | None = None


class TenantSettings(BaseModel):
    """A namespace of its own: its tiers, whose capacities are its quota, and its own `lm://` port."""

    model_config = _FROZEN

    tiers: TierList
    listen: ListenAddress | None = None


class ServerSettings(BaseModel):
    """`droidspeak serve`.

    Attributes:
        listen: where `lm://` clients connect.
        http: the HTTP side; `None` for none.
        tokens: needed for all but health once there are any, and on a non-loopback address.
        tls: for both ports.
        tenants: by name; the default tenant is the configuration's own `tiers`.
        max_connections: open `lm://` connections, over all tenants; the next one is closed at once. As many
            again on the HTTP side.
        header_timeout: seconds from a request's first byte to the end of its header.
        stall_timeout: seconds without a byte inside a payload, or of waiting for the budget.
        idle_timeout: seconds between requests; none by default, since LMCache's client never
            reconnects. TCP keep-alive finds the dead.
        in_flight: bytes of payloads that are being received or sent.
        max_object: bytes of one object.
        acknowledge: `durable`: EXIST says yes when a tier that outlives the process holds the object,
            where there is such a tier. `memory`: as soon as any tier does.
        drain_timeout: seconds that connections have at SIGTERM to finish their request.
    """

    model_config = _FROZEN

    listen: ListenAddress = Address(host="127.0.0.1", port=65432)
    http: ListenAddress | None = Address(host="127.0.0.1", port=65433)
    tokens: tuple[TokenSettings, ...] = ()
    tls: TlsSettings | None = None
    tenants: dict[str, TenantSettings] = {}
    max_connections: int = Field(default=1024, gt=0)
    header_timeout: float = Field(default=10.0, gt=0)
    stall_timeout: float = Field(default=30.0, gt=0)
    idle_timeout: float | None = Field(default=None, gt=0)
    in_flight: Size = 1 << 30
    max_object: Size = Field(default=512 << 20, le=_LENGTH_LIMIT)
    acknowledge: Literal["durable", "memory"] = "durable"
    drain_timeout: float = Field(default=30.0, ge=0)

    @field_validator("tenants")
    @classmethod
    def _named(cls, tenants: dict[str, TenantSettings]) -> dict[str, TenantSettings]:
        odd = [name for name in tenants if not name.isidentifier() or not name.isascii()]
        if odd:
            raise ValueError(f"tenant {odd[0]!r}: allowed are letters, digits and _")
        return tenants

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.in_flight < self.max_object:
            raise ValueError(f"in_flight must be at least max_object ({self.max_object})")
        for token in self.tokens:
            if token.tenant and token.tenant not in self.tenants:
                raise ValueError(f"token {token.name!r} is for unknown tenant {token.tenant!r}")
        if self.http and not self.http.loopback and not self.tokens:
            raise ValueError(f"http on {self.http} needs tokens: it can be reached from other machines")
        return self
