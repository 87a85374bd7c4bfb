"""Tiers by URL or mapping: what stands in configuration files, environment and command lines.

    cpu://?capacity=8GiB&eviction=lru
    gpu://0?capacity=2GiB
    disk:///var/cache/droidspeak?capacity=200GiB&min_free=1GiB&eviction=s3-fifo
    disk://~/.cache/droidspeak
    s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1
    droidspeak://host:65433?token_file=/etc/droidspeak/token&tls=true

The mapping form has the same options and `type` for the scheme; what a URL says before the `?` is
`device` (gpu), `path` (disk), `bucket` and `prefix` (s3), `host` and `port` (droidspeak):

    {"type": "disk", "path": "/var/cache/droidspeak", "capacity": "200GiB"}

Secrets stand in a mapping, a file or the environment, never in a URL.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from droidspeak.errors import ConfigError, TierUnavailable
from droidspeak.storage.eviction import EvictionPolicy, get_eviction
from droidspeak.storage.tier import Tier

__all__ = [
    "checked_options",
    "open_tier",
    "open_tier_late",
    "parse_size",
    "tier_options",
    "without_secrets",
]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_SECRET = re.compile(r"(?<=//)[^/?#]*(?=@)|(?<=[?&]token=)[^&#]*")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")


def open_tier(description: str | Mapping[str, Any]) -> Tier:
    """The tier that a URL or a mapping describes.

    Raises:
        ConfigError: an unknown scheme or option, or a value that is not allowed; one line.
        MissingExtra: the tier's optional part is not installed.
        TierUnavailable: the tier cannot be opened.
    """
    options = tier_options(description)
    return _SCHEMES[options.pop("type")].open(options, _shown(description))


def tier_options(description: str | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping form of a description, as it was given: the values are not looked at yet.

    Raises:
        ConfigError: no URL of a tier, or an unknown scheme.
    """
    options = _from_url(description) if isinstance(description, str) else dict(description)
    scheme = options.get("type")
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        allowed = ", ".join(f"{known}://" for known in _SCHEMES)
        raise ConfigError(f"unknown tier {scheme!r} in {_shown(description)}; allowed: {allowed}")
    return options


def checked_options(description: str | Mapping[str, Any]) -> dict[str, Any]:
    """As `tier_options`, with all values read; nothing is opened. Raises `ConfigError` as `open_tier`."""
    options = tier_options(description)
    kind = options.pop("type")
    return {"type": kind, **_SCHEMES[kind].read(options, _shown(description))}


def without_secrets(url: str) -> str:
    """`url` as it may be shown."""
    return _SECRET.sub("...", url)


def open_tier_late(description: str | Mapping[str, Any]) -> Tier:
    """As `open_tier`, but a tier that cannot be opened now is tried again whenever it is used.

    Raises:
        ConfigError, MissingExtra: as `open_tier`; these do not get better by waiting.
    """
    try:
        return open_tier(description)
    except TierUnavailable:
        from droidspeak.storage.late import LateTier

        options = _from_url(description) if isinstance(description, str) else description
        return LateTier(lambda: open_tier(description), str(options.get("name", options["type"])))


def parse_size(value: str | int) -> int:
    """Bytes of `"8GiB"`, `"1.5 MB"`, `"4096"` or a number of bytes. Raises `ConfigError`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigError(f"not a size: {value!r}; allowed is a number with or without {units}")
    return int(Fraction(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class _Scheme:
    """How one kind of tier is described and opened.

    Attributes:
        build: makes the tier from its options.
        place: reads a URL's authority and path into options.
        parsers: how the value of each option is read; other options are refused.
        required: options that have no default. An option that is `None` is not given.
        secret: options that no URL may have.
    """

    build: Callable[..., Tier]
    place: Callable[[SplitResult], dict[str, str]]
    parsers: Mapping[str, Callable[[Any], Any]]
    required: frozenset[str] = field(default=frozenset())
    secret: frozenset[str] = field(default=frozenset())

    def open(self, options: Mapping[str, Any], shown: str) -> Tier:
        return self.build(**self.read(options, shown))

    def read(self, options: Mapping[str, Any], shown: str) -> dict[str, Any]:
        """The options' values. Raises `ConfigError`."""
        options = {name: value for name, value in options.items() if value is not None}
        unknown = sorted(map(str, options.keys() - self.parsers.keys()))
        if unknown:
            raise ConfigError(
                f"{shown}: unknown option {', '.join(unknown)}; allowed: {', '.join(self.parsers)}"
            )
        absent = sorted(self.required - options.keys())
        if absent:
            raise ConfigError(f"{shown}: {', '.join(absent)} is missing")
        return {name: self._parse(name, value, shown) for name, value in options.items()}

    def _parse(self, name: str, value: Any, shown: str) -> Any:
        try:
            return self.parsers[name](value)
        except ConfigError as error:
            raise ConfigError(f"{shown}: {name}: {error}") from None


def _from_url(url: str) -> dict[str, Any]:
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        allowed = "allowed is scheme://place?option=value&option=value"
        raise ConfigError(f"not a tier URL: {_shown(url)}; {allowed}") from None
    options = dict(pairs)
    if len(options) < len(pairs) or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"{_shown(url)}: allowed are a place and options, each once, and no credentials")
    if "type" in options:
        raise ConfigError(f"{_shown(url)}: the scheme is the type")
    scheme = _SCHEMES.get(parts.scheme)
    if scheme and (told := sorted(scheme.secret & options.keys())):
        raise ConfigError(f"{parts.scheme}://...: no URL may hold a {told[0]}; allowed is {told[0]}_file")
    place = scheme.place(parts) if scheme else {}
    twice = sorted(place.keys() & options.keys())
    if twice:
        raise ConfigError(f"{_shown(url)}: {', '.join(twice)} stands before the ? already")
    return {"type": parts.scheme, **place, **options}


def _shown(description: str | Mapping[str, Any]) -> str:
    """The description as errors show it: without what may be a secret."""
    if isinstance(description, str):
        return repr(without_secrets(description))
    return f"tier {description.get('type')!r}"


# Values


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"not a text: {value!r}")
    return value


def _secret(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError("not a text")  # what it is instead may still be the secret
    return value


def _positive_size(value: Any) -> int:
    size = parse_size(value)
    if size == 0:
        raise ConfigError("allowed are sizes above 0")
    return size


def _count(value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"not a number above 0: {value!r}")
    return int(text)


def _port(value: Any) -> int:
    port = _count(value)
    if port > 65535:
        raise ConfigError(f"{port}; allowed are ports up to 65535")
    return port


def _index(value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal():
        raise ConfigError(f"not a device number: {value!r}")
    return int(text)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds < math.inf:
        raise ConfigError(f"not a number of seconds above 0: {value!r}")
    return seconds


def _switch(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{value!r}; allowed: true, false")
    return text == "true"


def _eviction(value: Any) -> EvictionPolicy:
    return get_eviction(_text(value))


def _path(value: Any) -> Path:
    try:
        path = Path(value).expanduser()
    except (TypeError, RuntimeError) as error:  # RuntimeError: a home that cannot be found
        raise ConfigError(f"not a path: {value!r} ({error})") from None
    if not path.is_absolute():
        raise ConfigError(f"relative path {str(value)!r}; allowed are /absolute/path and ~/path")
    return path


def _web_address(value: Any) -> str:
    text = _text(value)
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
        raise ConfigError("not an endpoint; allowed are http://host:port and https://host")
    return text


# Places


def _no_place(parts: SplitResult) -> dict[str, str]:
    if parts.netloc or parts.path.strip("/"):
        raise ConfigError(f"{parts.scheme}:// names no place, but it says {parts.netloc + parts.path!r}")
    return {}


def _gpu_place(parts: SplitResult) -> dict[str, str]:
    if parts.path.strip("/"):
        raise ConfigError(f"gpu:// names a device, as in gpu://0, not {parts.netloc + parts.path!r}")
    return {"device": parts.netloc} if parts.netloc else {}


def _disk_place(parts: SplitResult) -> dict[str, str]:
    path = unquote(parts.netloc + parts.path)
    return {"path": path} if path else {}


def _s3_place(parts: SplitResult) -> dict[str, str]:
    prefix = unquote(parts.path).strip("/")
    place = {"bucket": parts.netloc} if parts.netloc else {}
    return {**place, "prefix": prefix} if prefix else place


def _daemon_place(parts: SplitResult) -> dict[str, str]:
    if parts.path.strip("/"):
        raise ConfigError(
            f"droidspeak:// names a daemon, as in droidspeak://host:65433, not {parts.path!r} too"
        )
    host, colon, port = parts.netloc.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = parts.netloc, ""
    place = {"host": host.removeprefix("[").removesuffix("]")} if host else {}
    return {**place, "port": port} if port else place


# Tiers, imported where they are opened


def _open_cpu(*, capacity: int = 4 << 30, **options: Any) -> Tier:
    from droidspeak.storage.memory import MemoryTier

    return MemoryTier(capacity, **options)


def _open_gpu(*, capacity: int = 1 << 30, device: int = 0, **options: Any) -> Tier:
    from droidspeak.storage.memory import MemoryTier

    return MemoryTier(capacity, device=f"cuda:{device}", **options)


def _open_disk(*, path: Path, **options: Any) -> Tier:
    from droidspeak.storage.disk import DiskTier

    return DiskTier(path, **options)


def _open_s3(*, bucket: str, **options: Any) -> Tier:
    from droidspeak.storage.s3 import S3Tier

    return S3Tier(bucket, **options)


def _open_remote(*, host: str, **options: Any) -> Tier:
    from droidspeak.storage.remote import RemoteTier

    return RemoteTier(host, **options)


_MEMORY = {"capacity": _positive_size, "eviction": _eviction, "name": _text}
_SCHEMES = {
    "cpu": _Scheme(_open_cpu, _no_place, _MEMORY),
    "gpu": _Scheme(_open_gpu, _gpu_place, {"device": _index, **_MEMORY}),
    "disk": _Scheme(
        _open_disk,
        _disk_place,
        {"path": _path, **_MEMORY, "min_free": parse_size, "read_only": _switch},
        frozenset({"path"}),
    ),
    "s3": _Scheme(
        _open_s3,
        _s3_place,
        {
            "bucket": _text,
            "prefix": _text,
            "endpoint": _web_address,
            "region": _text,
            "timeout": _seconds,
            "attempts": _count,
            "concurrency": _count,
            "name": _text,
        },
        frozenset({"bucket"}),
    ),
    "droidspeak": _Scheme(
        _open_remote,
        _daemon_place,
        {
            "host": _text,
            "port": _port,
            "tls": _switch,
            "ca": _path,
            "token": _secret,
            "token_file": _path,
            "tenant": _text,
            "timeout": _seconds,
            "concurrency": _count,
            "name": _text,
        },
        frozenset({"host"}),
        frozenset({"token"}),
    ),
}
