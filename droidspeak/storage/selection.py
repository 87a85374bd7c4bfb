"""Which chunks of a tier are meant, in which order, and how many.

    Selection((Condition("size", ">", 1 << 30), Condition("used", "<", week_ago)), sort="size")

A condition is one description with two readings: of a record in Python (`matches`) and of the disk tier's
catalog in SQL (`sql`). They agree for every record that a catalog can hold. What a tier does not know
(`None`) meets no condition and stands last in every order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from droidspeak.errors import UsageError
from droidspeak.storage.tier import ChunkRecord

__all__ = ["FIELDS", "LISTED", "Condition", "Field", "Selection"]

Value = str | int | tuple[str, ...]

_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda mine, theirs: bool(mine == theirs),
    "!=": lambda mine, theirs: bool(mine != theirs),
    "<": lambda mine, theirs: bool(mine < theirs),
    "<=": lambda mine, theirs: bool(mine <= theirs),
    ">": lambda mine, theirs: bool(mine > theirs),
    ">=": lambda mine, theirs: bool(mine >= theirs),
}
_SAME = ("=", "!=")
_MOST = 2**63 - 1


@dataclass(frozen=True)
class Field:
    """Something that chunks are told apart by.

    Attributes:
        of: its value in a record.
        sql: its value in a row of the catalog.
        operators: those that make sense.
        kind: `number`; `text`; `begins`: a text that may begin with any of several; `layers`: has it.
    """

    of: Callable[[ChunkRecord], Any]
    sql: str
    operators: tuple[str, ...] = _SAME
    kind: str = "text"


_ALL = tuple(_ORDER)
FIELDS: dict[str, Field] = {
    "source": Field(lambda record: record.info.key.source, "substr(key, 1, 64)", kind="begins"),
    "shard": Field(lambda record: record.info.key.shard, "substr(key, 66, length(key) - 130)"),
    "prefix": Field(lambda record: record.info.key.prefix, "substr(key, -64)", kind="begins"),
    "tier": Field(lambda record: record.info.tier, ":tier"),
    "salt": Field(lambda record: record.info.salt, "salt"),
    "codec": Field(lambda record: record.info.codec, "codec"),
    "e": Field(lambda record: record.info.e_layers, "e_layers", kind="layers"),
    "tokens": Field(lambda record: record.info.tokens, "tokens", _ALL, "number"),
    "size": Field(lambda record: record.info.nbytes, "nbytes", _ALL, "number"),
    "created": Field(lambda record: record.created, "created", _ALL, "number"),
    "used": Field(lambda record: record.used, "used", _ALL, "number"),
    "hits": Field(lambda record: record.hits, "hits", _ALL, "number"),
    "pinned": Field(lambda record: record.pinned, "pinned", _SAME, "number"),
}
"""By name. `created` and `used` are in ns since the epoch, `size` is in bytes."""

LISTED = frozenset({"source", "shard", "prefix", "tier", "size", "created"})
"""What the listing of an object store tells without a look at each object."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition.

    Attributes:
        field: a name of `FIELDS`.
        value: a number or a text; of `source` and `prefix` the beginnings that are meant; of `e` a layer.

    Raises:
        UsageError: a field, operator or value that there is not.
    """

    field: str
    operator: str
    value: Value

    def __post_init__(self) -> None:
        known = FIELDS.get(self.field)
        if known is None:
            raise UsageError(f"no field {self.field!r}; allowed: {', '.join(FIELDS)}")
        if self.operator not in known.operators:
            raise UsageError(f"{self.field}{self.operator}: allowed are {' '.join(known.operators)}")
        types = {"number": int, "layers": int, "text": str, "begins": tuple}[known.kind]
        if not isinstance(self.value, types) or (isinstance(self.value, int) and abs(self.value) > _MOST):
            raise UsageError(f"{self.field}: {self.value!r} is no value of it")

    def matches(self, record: ChunkRecord) -> bool:
        """Whether `record` meets it."""
        known = FIELDS[self.field]
        value = known.of(record)
        if value is None:
            return False
        if known.kind == "begins":
            return value.startswith(self.value) is (self.operator == "=")
        if known.kind == "layers":
            return (self.value in value) is (self.operator == "=")
        if self.field == "tier":
            return _is_tier(value, str(self.value)) is (self.operator == "=")
        return _ORDER[self.operator](value, self.value)

    def sql(self, tier: str) -> tuple[str, list[Any]]:
        """The same as an SQL expression over the catalog of the tier called `tier`, and its values."""
        known = FIELDS[self.field]
        negation = "" if self.operator == "=" else "NOT "
        if self.field == "tier":
            met = _is_tier(tier, str(self.value)) is (self.operator == "=")
            return ("1" if met else "0"), []
        if known.kind == "layers":
            return f"{negation}instr(',' || e_layers || ',', ',' || ? || ',')", [self.value]
        if isinstance(self.value, tuple):
            parts = [_begins(self.field, beginning) for beginning in self.value]
            joined = " OR ".join(part for part, _ in parts) or "0"
            return f"{negation}({joined})", [value for _, values in parts for value in values]
        return f"{known.sql} {self.operator} ?", [self.value]


def _is_tier(name: str, wanted: str) -> bool:
    """Whether `name` is the tier `wanted`, or one behind it (`remote/disk`)."""
    return name == wanted or name.startswith(f"{wanted}/")


def _begins(field: str, beginning: str) -> tuple[str, list[Any]]:
    if field == "source":
        # A range of the primary key. No key has a letter above `f`.
        return "(key >= ? AND key < ?)", [beginning, f"{beginning}g"]
    return "substr(key, -64, ?) = ?", [len(beginning), beginning]


@dataclass(frozen=True, slots=True)
class Selection:
    """The chunks that meet all of `conditions`.

    Attributes:
        sort: name of the field that orders them; chunks that do not differ in it stand by key, or, without
            it, in any order.
        limit: how many of them at most.
    """

    conditions: tuple[Condition, ...] = ()
    sort: str | None = None
    descending: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.sort is not None and (self.sort not in FIELDS or self.sort == "e"):
            raise UsageError(f"no order by {self.sort!r}; allowed: {', '.join(sorted(set(FIELDS) - {'e'}))}")

    def matches(self, record: ChunkRecord) -> bool:
        """Whether `record` meets all conditions."""
        return all(condition.matches(record) for condition in self.conditions)

    def of(self, records: Iterable[ChunkRecord]) -> Iterator[ChunkRecord]:
        """The records that are meant. Without `sort` they stream; with it and a limit, no more are kept."""
        met = filter(self.matches, records)
        if self.sort is None:
            return islice(met, self.limit)
        if self.limit is None:
            return iter(sorted(met, key=self.rank))
        return iter(heapq.nsmallest(self.limit, met, key=self.rank))

    def merge(self, parts: Collection[Iterator[ChunkRecord]]) -> Iterator[ChunkRecord]:
        """The records that are meant, of parts that are each selected already."""
        if self.sort is None:
            return islice((record for part in parts for record in part), self.limit)
        return islice(heapq.merge(*parts, key=self.rank), self.limit)

    def rank(self, record: ChunkRecord) -> Any:
        """What orders `record` among others."""
        value = FIELDS[self.sort or "source"].of(record)
        known = 0 if value is None else _Descending(value) if self.descending else value
        return value is None, known, str(record.info.key), record.info.tier or ""

    def split(self, known: Collection[str]) -> tuple[Selection, Selection]:
        """Two selections, one after the other: by the `known` fields, and by what takes a closer look.

        The first has the order and the limit if they depend on known fields only.
        """
        early = tuple(condition for condition in self.conditions if condition.field in known)
        late = tuple(condition for condition in self.conditions if condition.field not in known)
        if late or (self.sort is not None and self.sort not in known):
            return Selection(early), replace(self, conditions=late)
        return self, Selection()

    def sql(self, tier: str) -> tuple[str, list[Any]]:
        """`WHERE` and `ORDER BY` for the catalog of the tier called `tier`, and the values."""
        parts = [condition.sql(tier) for condition in self.conditions]
        where = " AND ".join(f"({part})" for part, _ in parts) or "1"
        values = [value for _, some in parts for value in some]
        if self.sort is None:
            return where, values
        column = "''" if self.sort == "tier" else FIELDS[self.sort].sql
        return f"{where} ORDER BY {column}{' DESC' if self.descending else ''}, key", values


class _Descending:
    """A value that stands before smaller ones."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: _Descending) -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and bool(self.value == other.value)

    __hash__ = None  # type: ignore[assignment]
