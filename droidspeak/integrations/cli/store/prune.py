"""`droidspeak store prune` and `purge`: chunks leave by rule, or because their model is no more."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from droidspeak.errors import NotFound, UsageError
from droidspeak.integrations.cli.output import (
    Format,
    FormatOption,
    note,
    show_document,
    show_table,
)
from droidspeak.integrations.cli.store.confirm import YesOption, require_yes
from droidspeak.integrations.cli.store.names import short
from droidspeak.integrations.cli.store.selecting import (
    FilterArgument,
    FilterOption,
    model_ids,
    parse_age,
    salt_tag_of,
)
from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.integrations.cli.store.target import (
    ConfigOption,
    StoreOption,
    Target,
    descriptions,
    open_target,
)
from droidspeak.storage.pruning import PruneRule, Tally, carry_out, plan
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.urls import parse_size

__all__ = ["prune", "purge"]

# Who writes all the time is not waited for.
_ROUNDS = 5
_Dry = Annotated[bool, typer.Option("--dry-run", help="Only say what would leave.")]


def prune(
    more: FilterArgument = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Last used longer ago than, such as 7d or 12h.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Least recently used chunks, until a tier has only so many bytes."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="MODEL", help="Of this source model: id, folder or name; repeatable."
        ),
    ] = None,
    salt: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Of this tenant: tag of its salt, or @FILE with the salt."),
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="What writers left that were killed (disk tiers).")
    ] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Files without row and rows without file (disk tiers).")
    ] = False,
    filter: FilterOption = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Pinned chunks too.")] = False,
    dry_run: _Dry = False,
    yes: YesOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Remove chunks that meet all that is asked for. A chunk that is used meanwhile stays."""
    filters = [*(filter or []), *(more or [])]
    if salt is not None:
        filters.append(f"salt={salt_tag_of(salt)}")
    unused_since = None if older_than is None else time.time_ns() - parse_age(older_than)
    size = None if max_size is None else parse_size(max_size)
    chosen = bool(filters or model or unused_since is not None or size is not None)
    if not (chosen or incomplete or orphans):
        raise UsageError(
            "prune what? Allowed are --older-than, --max-size, --model, --salt, --filter, --incomplete and"
            " --orphans"
        )
    with open_target(store, config) as target:
        conditions = [*target.selection(filters).conditions]
        if model:
            ids = tuple(source for text in model for source in model_ids(text, lambda: target.names))
            conditions.append(Condition("source", "=", ids))
        rule = PruneRule(Selection(tuple(conditions)), unused_since, size, pinned) if chosen else None
        garbage = _Garbage(descriptions(store, target), incomplete=incomplete, orphans=orphans)
        planned = _planned(target, rule, garbage)
    done = planned
    if not dry_run and _anything(planned, "leave", yes):
        done = _pruned(store, config, rule, garbage)
    _show(format, done, dry_run=dry_run)


def purge(
    source: Annotated[
        str, typer.Option(metavar="SOURCE_ID|FOLDER|NAME", help="The source model whose chunks all leave.")
    ],
    dry_run: _Dry = False,
    yes: YesOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Remove all chunks of a source model from all tiers, pinned ones too: its weights are no more."""
    with open_target(store, config) as target:
        chosen = _source(target, source)
        rule = PruneRule(Selection((Condition("source", "=", (chosen,)),)), pinned=True)
        planned = _planned(target, rule, None)
    done = planned
    if not dry_run and _anything(planned, f"of {chosen[:12]} leave", yes):
        done = _pruned(store, config, rule, None, rounds=_ROUNDS)
    _show(format, done, dry_run=dry_run)


def _source(target: Target, text: str) -> str:
    ids = model_ids(text, lambda: target.names)
    held = {source for tier in target.tiers.values() for source in tier.sources()}
    found = sorted(source for source in held if source.startswith(ids))
    if not found:
        raise NotFound(f"no chunks of {text} in {', '.join(target.tiers)}")
    if len(found) > 1:
        raise UsageError(f"{text} is the beginning of several source ids: {', '.join(map(_digits, found))}")
    return found[0]


def _digits(source: str) -> str:
    return source[:16]


# What is not a chunk


class _Garbage:
    """Leftovers and orphans of disk tiers."""

    def __init__(self, tiers: Iterable[Mapping[str, Any]], *, incomplete: bool, orphans: bool) -> None:
        self._tiers = [tier for tier in tiers if tier["type"] == "disk"]
        self._incomplete, self._orphans = incomplete, orphans

    def look(self, *, remove: bool) -> dict[str, dict[str, int]]:
        """How many of each there are, and their bytes, by tier; they are removed if asked."""
        if not (self._incomplete or self._orphans):
            return {}
        return {tier["name"]: self._of(tier, remove) for tier in self._tiers}

    def _of(self, tier: Mapping[str, Any], remove: bool) -> dict[str, int]:
        from droidspeak.integrations.cli.store.verify import findings_of
        from droidspeak.storage.verify import FindingKind, VerifyCounts, VerifyOptions

        orphans = {FindingKind.ORPHAN_FILE, FindingKind.ORPHAN_ROW} if self._orphans else set()
        kinds = frozenset(orphans | ({FindingKind.LEFTOVER} if self._incomplete else set()))
        counted = {"incomplete": 0, "orphans": 0, "bytes": 0}
        options = VerifyOptions(repair=remove, adopt=False, kinds=kinds)
        for finding in findings_of(tier, options, VerifyCounts()):
            if finding.kind in kinds:
                counted["incomplete" if finding.kind is FindingKind.LEFTOVER else "orphans"] += 1
                counted["bytes"] += finding.nbytes
        return counted


# The plan and what became of it


@dataclass
class _Result:
    """What would leave, or has left, a tier."""

    tally: Tally = field(default_factory=Tally)
    incomplete: int = 0
    orphans: int = 0
    garbage_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.tally.nbytes + self.garbage_bytes

    @property
    def count(self) -> int:
        """Chunks, leftovers and orphans."""
        return self.tally.chunks + self.incomplete + self.orphans

    def set_garbage(self, counted: Mapping[str, int]) -> None:
        """Takes over what `_Garbage.look` has counted."""
        self.incomplete, self.orphans = counted["incomplete"], counted["orphans"]
        self.garbage_bytes = counted["bytes"]


@dataclass
class _Results:
    """Results by tier, and what source models are called."""

    tiers: dict[str, _Result]
    names: Mapping[str, str]


def _planned(target: Target, rule: PruneRule | None, garbage: _Garbage | None) -> _Results:
    results = {name: _Result(plan(tier, rule) if rule else Tally()) for name, tier in target.tiers.items()}
    for name, counted in (garbage.look(remove=False) if garbage else {}).items():
        results[name].set_garbage(counted)
    return _Results(results, target.names)


def _anything(planned: _Results, what: str, yes: bool) -> bool:
    """Whether there is something to do, after it was said and agreed to."""
    for name, result in planned.tiers.items():
        if result.count:
            note(f"{name}: {_told(result)}{_by_source(result.tally, planned.names)}")
    count = sum(result.count for result in planned.tiers.values())
    if not count:
        note("nothing to remove")
        return False
    nbytes = sum(result.nbytes for result in planned.tiers.values())
    require_yes(f"Let {count} objects, {size_text(nbytes)}, {what}?", yes)
    return True


def _told(result: _Result) -> str:
    parts = [
        f"{result.tally.chunks} chunks" if result.tally.chunks else "",
        f"{result.incomplete} leftovers" if result.incomplete else "",
        f"{result.orphans} orphans" if result.orphans else "",
    ]
    return f"{', '.join(filter(None, parts))}, {size_text(result.nbytes)}"


def _by_source(tally: Tally, names: Mapping[str, str]) -> str:
    rows = sorted(tally.sources.items(), key=lambda row: -row[1][1])
    told = "; ".join(f"{short(source, names)} {chunks} ({size_text(n)})" for source, (chunks, n) in rows)
    return f": {told}" if told else ""


def _pruned(
    store: list[str] | None,
    config: Path | None,
    rule: PruneRule | None,
    garbage: _Garbage | None,
    rounds: int = 1,
) -> _Results:
    """Does it. What was listed and stayed is tried again in the next of the `rounds`."""
    # Before the tiers are opened for a change: that alone settles what killed writers have left.
    removed = garbage.look(remove=True) if garbage else {}
    with open_target(store, config, change=True) as target:
        results = {name: _Result() for name in target.tiers}
        for name, counted in removed.items():
            results[name].set_garbage(counted)
        for name, tier in target.tiers.items() if rule else ():
            assert rule
            results[name].tally = _sum([carry_out(tier, rule)])
            for _round in range(1, rounds):
                if plan(tier, rule).chunks:
                    results[name].tally = _sum([results[name].tally, carry_out(tier, rule)])
        return _Results(results, target.names)


def _sum(tallies: Sequence[Tally]) -> Tally:
    total = Tally(kept=tallies[-1].kept)
    for tally in tallies:
        total.chunks += tally.chunks
        total.nbytes += tally.nbytes
        for source, (chunks, nbytes) in tally.sources.items():
            held = total.sources.get(source, (0, 0))
            total.sources[source] = held[0] + chunks, held[1] + nbytes
    return total


def _show(format: Format, results: _Results, *, dry_run: bool) -> None:
    rows = [_row(name, result, results.names) for name, result in results.tiers.items()]
    document = {
        "version": 1,
        "dry_run": dry_run,
        "chunks": sum(row["chunks"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "tiers": rows,
    }
    title = "Would leave" if dry_run else "Left"
    columns = ["tier", "chunks", "incomplete", "orphans", "size", "stayed"]
    cells = [
        [row["tier"], *(str(row[name]) for name in columns[1:4]), size_text(row["bytes"]), str(row["kept"])]
        for row in rows
    ]
    show_document(format, document, lambda: show_table(title, columns, cells))


def _row(name: str, result: _Result, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "tier": name,
        "chunks": result.tally.chunks,
        "incomplete": result.incomplete,
        "orphans": result.orphans,
        "bytes": result.nbytes,
        "kept": result.tally.kept,
        "sources": [
            {"source": source, "model": names.get(source), "chunks": chunks, "bytes": nbytes}
            for source, (chunks, nbytes) in sorted(result.tally.sources.items())
        ],
    }
