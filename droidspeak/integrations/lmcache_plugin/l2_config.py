"""What `adapter_params` of our L2 adapter may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase

from droidspeak.config.opening import settings_from
from droidspeak.errors import ConfigError

__all__ = ["DroidSpeakL2AdapterConfig"]

_STORE_KEYS = ("tiers", "config", "codec", "promote", "write_queue", "limits")
_OWN_KEYS = ("workers", "acknowledge", "persist_timeout", "direct")
_ACKNOWLEDGE = ("durable", "memory")


class DroidSpeakL2AdapterConfig(L2AdapterConfigBase):  # type: ignore[misc]
    """`adapter_params`, checked.

    Attributes:
        store: options of the store, as `opening.open_store_from` takes them.
        codec: of what is stored, `raw` or `zstd`.
        workers: threads per kind of task: store, lookup, load.
        acknowledge: `durable`: a store task has succeeded when a tier that outlives the process holds
            all of it, where there is such a tier. `memory`: as soon as any tier or its queue does.
        persist_timeout: seconds that a store task waits for that.
        direct: read straight into LMCache's memory. A read that misses its deadline is then reported
            when it has let go of that memory, not before.
    """

    def __init__(
        self,
        store: Mapping[str, Any] | None = None,
        *,
        codec: str = "raw",
        workers: int = 4,
        acknowledge: str = "durable",
        persist_timeout: float = 60.0,
        direct: bool = True,
    ) -> None:
        self.store = dict(store or {})
        self.codec = codec
        self.workers = workers
        self.acknowledge = acknowledge
        self.persist_timeout = persist_timeout
        self.direct = direct

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Self:
        """The configuration in `adapter_params`.

        Raises:
            ConfigError: one line that names the parameter and what is allowed.
        """
        unknown = sorted(map(str, d.keys() - {*_STORE_KEYS, *_OWN_KEYS}))
        if unknown:
            raise ConfigError(
                f"unknown adapter_params key {unknown[0]!r}; allowed: {', '.join((*_STORE_KEYS, *_OWN_KEYS))}"
            )
        store = {key: d[key] for key in _STORE_KEYS if key in d}
        own = {key: _checked(key, d[key]) for key in _OWN_KEYS if key in d}
        return cls(store, codec=settings_from(store).codec, **own)

    @classmethod
    def help(cls) -> str:
        return (
            "DroidSpeak L2 adapter_params:\n"
            "- tiers (list): from fast to slow, URLs or mappings: cpu://?capacity=1GiB, "
            "disk:///path?capacity=100GiB, s3://bucket/prefix\n"
            "- config (str): a YAML configuration file; the other keys win over it\n"
            "- codec (str): raw or zstd\n"
            "- promote (bool), write_queue (size), limits (mapping): as in the configuration file\n"
            "- workers (int): threads for each of store, lookup and load (default 4)\n"
            "- acknowledge (str): durable or memory (default durable)\n"
            "- persist_timeout (float): seconds a store task waits to be durable (default 60)\n"
            "- direct (bool): read straight into LMCache's memory (default true)"
        )


def _checked(key: str, value: Any) -> Any:
    allowed, fine = _ALLOWED[key](value)
    if not fine:
        raise ConfigError(f"adapter_params key {key!r}: allowed is {allowed}, not {value!r}")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_ALLOWED: dict[str, Callable[[Any], tuple[str, bool]]] = {
    "workers": lambda value: ("1 to 64", type(value) is int and 1 <= value <= 64),
    "acknowledge": lambda value: (" or ".join(_ACKNOWLEDGE), value in _ACKNOWLEDGE),
    "persist_timeout": lambda value: ("0 to 86400 seconds", _number(value) and 0 < value <= 86400),
    "direct": lambda value: ("true or false", isinstance(value, bool)),
}
