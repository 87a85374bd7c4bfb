"""`--filter` and `--sort`: which chunks a command is for.

    size>1GB  tokens<=128  hits>=2                    sizes and numbers
    accessed>7d  created<2026-01-01                   ages (7d, 12h, 30m: longer ago) and times (UTC)
    model=3fa9c1d2  model=./llama  model=base         source id, model folder, name that a policy gives
    tier=disk  codec=zstd  shard=0of2  e=3  pinned=true
    salt=0f31c2...  salt=@FILE  salt=                 tag of a salt, file that holds the salt, no salt

Several filters must all be met.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from droidspeak.errors import ConfigError, UsageError
from droidspeak.storage.codecs import get_codec
from droidspeak.storage.keys import salt_tag
from droidspeak.storage.selection import FIELDS, Condition, Selection
from droidspeak.storage.urls import parse_size

__all__ = [
    "FilterArgument",
    "FilterOption",
    "Naming",
    "conditions_of",
    "model_ids",
    "parse_age",
    "salt_tag_of",
    "selection_of",
]

_HELP = (
    "size>1GB, accessed>7d, created<2026-01-01, tokens<=128, hits>=2, model=ID|FOLDER|NAME, salt=TAG|@FILE,"
    " tier=NAME, codec=NAME, shard=0of1, e=LAYER, pinned=true. Several must all be met."
)
FilterOption = Annotated[list[str] | None, typer.Option("--filter", metavar="FILTER", help=_HELP)]
FilterArgument = Annotated[list[str] | None, typer.Argument(metavar="[FILTER]...", help="More filters.")]

_FILTER = re.compile(r"\s*([A-Za-z_]*)\s*(!=|>=|<=|=|>|<)\s*(.*?)\s*", re.DOTALL)
_AGE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_HEX = re.compile(r"[0-9a-f]{8,64}")
_TAG = re.compile(r"[0-9a-f]{16}")
_SHARD = re.compile(r"[0-9]{1,4}of[0-9]{1,4}")
# An age that is greater is a time that is less.
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_TRUTH = {"true": 1, "yes": 1, "false": 0, "no": 0}
_SORTS = {"accessed": "used", "model": "source", **{name: name for name in FIELDS if name != "e"}}


@dataclass(frozen=True)
class Naming:
    """What names in filters stand for.

    Attributes:
        tiers: names of the tiers there are; any if `None`.
        models: names that policies give to source ids.
        now: in ns since the epoch, for ages.
    """

    tiers: Sequence[str] | None
    models: Callable[[], Mapping[str, str]]
    now: int


def selection_of(
    filters: Sequence[str],
    *,
    tiers: Sequence[str] | None = None,
    models: Callable[[], Mapping[str, str]] = dict,
    sort: str | None = None,
    limit: int | None = None,
) -> Selection:
    """What `filters`, `sort` (`KEY` or `KEY:desc`) and `limit` ask for.

    Args:
        tiers: names that `tier=` may have; any if `None`.
        models: names that policies give to source ids; asked for only if a filter needs one.

    Raises:
        UsageError: naming the filter and what is allowed.
    """
    key, descending = _order(sort)
    return Selection(conditions_of(filters, Naming(tiers, models, time.time_ns())), key, descending, limit)


def conditions_of(filters: Sequence[str], naming: Naming) -> tuple[Condition, ...]:
    """The conditions that `filters` write. Raises `UsageError`."""
    return tuple(_condition(text, naming) for text in filters)


def parse_age(text: str) -> int:
    """Nanoseconds of `"7d"`, `"12h"`, `"30m"`. Raises `UsageError`."""
    match = _AGE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"not an age: {text!r}; allowed is a number with s, m, h, d or w, such as 7d")
    return int(float(match[1]) * _SECONDS[match[2]] * 1e9)


def salt_tag_of(text: str) -> str:
    """The tag that `text` names: itself, that of the salt in `@FILE`, or none. Raises `UsageError`.

    What is neither is not repeated: it may be a salt.
    """
    if text.startswith("@"):
        try:
            return salt_tag(Path(text[1:]).expanduser().read_text().strip())
        except (OSError, UnicodeError, RuntimeError) as error:
            raise UsageError(f"salt file {text[1:]}: {getattr(error, 'strerror', None) or error}") from None
    if text and not _TAG.fullmatch(text):
        raise UsageError(
            "salt: allowed are the 16 hex digits of a tag, @FILE with the salt in it, and nothing for no salt"
        )
    return text


def model_ids(text: str, models: Callable[[], Mapping[str, str]]) -> tuple[str, ...]:
    """The source ids, or beginnings of one, that `text` names.

    Args:
        text: 8 or more digits of a source id, a model folder, or a name that a policy gives.

    Raises:
        UsageError: it is none of these.
        UnknownIdentity: a folder that is no model's.
    """
    if _HEX.fullmatch(text):
        return (text,)
    known = models()
    if named := tuple(source for source, name in known.items() if name == text):
        return named
    if text and (folder := Path(text).expanduser()).is_dir():
        from droidspeak.storage.identity import SourceManifest

        return (str(SourceManifest.from_folder(folder).source_id),)
    names = f" ({', '.join(sorted(set(known.values())))})" if known else ""
    raise UsageError(
        f"model {text!r}: allowed are 8 or more hex digits of a source id, a model folder, and a name that a"
        f" policy of the configured folder gives{names}"
    )


def _condition(text: str, naming: Naming) -> Condition:
    match = _FILTER.fullmatch(text)
    known = _PARSERS.get(match[1].lower()) if match else None
    if match is None or known is None:
        allowed = f"{', '.join(_PARSERS)} with = != > >= < or <= and a value"
        # What stands behind the operator may be a salt.
        shown = match[1] if match else text.split("=", maxsplit=1)[0]
        raise UsageError(f"not a filter: {shown!r}; allowed are {allowed}")
    field, parse = known
    return parse(field, match[2], match[3], naming)


def _order(sort: str | None) -> tuple[str | None, bool]:
    if sort is None:
        return None, False
    name, colon, direction = sort.partition(":")
    if name.lower() not in _SORTS or (colon and direction not in ("asc", "desc")):
        raise UsageError(
            f"not an order: {sort!r}; allowed is KEY, KEY:asc or KEY:desc, KEY {', '.join(_SORTS)}"
        )
    return _SORTS[name.lower()], direction == "desc"


# Values


def _size(field: str, operator: str, value: str, _naming: Naming) -> Condition:
    try:
        return Condition(field, operator, parse_size(value))
    except ConfigError as error:
        raise UsageError(f"{field}: {error}") from None


def _number(field: str, operator: str, value: str, _naming: Naming) -> Condition:
    if not (value.isascii() and value.isdecimal()):
        raise UsageError(f"{field}: {value!r}; allowed are whole numbers")
    return Condition(field, operator, int(value))


def _time(field: str, operator: str, value: str, naming: Naming) -> Condition:
    name = "accessed" if field == "used" else field
    if operator not in _TURNED:
        raise UsageError(f"{name}{operator}: allowed are > >= < <=")
    if _AGE.fullmatch(value):
        return Condition(field, _TURNED[operator], naming.now - parse_age(value))
    try:
        moment = datetime.fromisoformat(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return Condition(field, operator, int(moment.timestamp()) * 10**9 + moment.microsecond * 1000)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{name}: {value!r}; allowed are ages (7d, 12h, 30m) and times (2026-01-31, 2026-01-31T12:00)"
        ) from None


def _truth(field: str, operator: str, value: str, _naming: Naming) -> Condition:
    if value.lower() not in _TRUTH:
        raise UsageError(f"{field}: {value!r}; allowed: true, false")
    return Condition(field, operator, _TRUTH[value.lower()])


def _model(field: str, operator: str, value: str, naming: Naming) -> Condition:
    return Condition(field, operator, model_ids(value, naming.models))


def _salt(field: str, operator: str, value: str, _naming: Naming) -> Condition:
    return Condition(field, operator, salt_tag_of(value))


def _tier(field: str, operator: str, value: str, naming: Naming) -> Condition:
    if naming.tiers is not None and value.partition("/")[0] not in naming.tiers:
        raise UsageError(f"no tier {value!r}; allowed: {', '.join(naming.tiers)}")
    return Condition(field, operator, value)


def _codec(field: str, operator: str, value: str, _naming: Naming) -> Condition:
    get_codec(value)
    return Condition(field, operator, value)


def _shard(field: str, operator: str, value: str, _naming: Naming) -> Condition:
    if not _SHARD.fullmatch(value):
        raise UsageError(f"shard: {value!r}; allowed is RANKofSIZE, such as 0of1")
    return Condition(field, operator, value)


_Parse = Callable[[str, str, str, Naming], Condition]
_PARSERS: dict[str, tuple[str, _Parse]] = {
    "model": ("source", _model),
    "tier": ("tier", _tier),
    "size": ("size", _size),
    "tokens": ("tokens", _number),
    "created": ("created", _time),
    "accessed": ("used", _time),
    "hits": ("hits", _number),
    "pinned": ("pinned", _truth),
    "codec": ("codec", _codec),
    "e": ("e", _number),
    "shard": ("shard", _shard),
    "salt": ("salt", _salt),
}
