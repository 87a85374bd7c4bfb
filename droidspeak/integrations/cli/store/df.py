"""`droidspeak store df`: what tiers hold, and of which source models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from droidspeak.errors import DroidSpeakError, StorageError
from droidspeak.integrations.cli.output import Format, FormatOption, note, show_document, show_table
from droidspeak.integrations.cli.store.names import short
from droidspeak.integrations.cli.store.showing import share_text, size_text, slots_row
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, Target, open_target
from droidspeak.storage.tier import SlotBytes, Tier, TierUsage

__all__ = ["df"]

_KINDS = SlotBytes._fields


def df(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also bytes of K, V and E; looks at every chunk.")
    ] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show chunks and bytes of each tier and of each source model in it."""
    with open_target(store, config, tolerant=True) as target:
        failed = dict(target.failed)
        tiers: list[dict[str, Any]] = []
        sources: list[dict[str, Any]] = []
        for name, tier in target.tiers.items():
            try:
                found = _tiers_of(tier), _sources_of(tier, target, verbose=verbose)
            except StorageError as error:
                failed[name] = error
                continue
            tiers += found[0]
            sources += found[1]
        tiers += [_tier_row(name, None) for name in failed]
        document = {"version": 1, "tiers": tiers, "sources": sources}
        show_document(format, document, lambda: _show(tiers, sources, target, verbose=verbose))
    _fail(failed)


def _tiers_of(tier: Tier) -> list[dict[str, Any]]:
    return [_tier_row(name, usage) for name, usage in tier.by_tier().items()]


def _tier_row(name: str, usage: TierUsage | None) -> dict[str, Any]:
    reclaimable = None if usage is None or usage.pinned is None else usage.nbytes - usage.pinned
    return {
        "tier": name,
        "answers": usage is not None,
        "chunks": usage.chunks if usage else None,
        "bytes": usage.nbytes if usage else None,
        "capacity": usage.capacity if usage else None,
        "reclaimable": reclaimable,
    }


def _sources_of(tier: Tier, target: Target, *, verbose: bool) -> list[dict[str, Any]]:
    kinds = tier.slot_bytes() if verbose else {}
    return [
        {
            "source": source,
            "model": target.names.get(source),
            "tier": tier.name,
            "chunks": usage.chunks,
            "bytes": usage.nbytes,
            "slots": slots_row(kinds.get(source)),
        }
        for source, usage in sorted(tier.sources().items(), key=lambda row: (-row[1].nbytes, row[0]))
    ]


def _show(
    tiers: list[dict[str, Any]], sources: list[dict[str, Any]], target: Target, *, verbose: bool
) -> None:
    show_table(
        "Tiers",
        ["tier", "chunks", "size", "capacity", "used", "reclaimable"],
        [_tier_cells(t) for t in tiers],
    )
    if sources:
        print()
        kinds = [*(kind.upper() for kind in _KINDS), "other"] if verbose else []
        rows = [_source_cells(row, target.names, verbose=verbose) for row in sources]
        show_table("Source models", ["model", "tier", "chunks", "size", *kinds], rows)


def _tier_cells(row: Mapping[str, Any]) -> list[str]:
    if not row["answers"]:
        return [row["tier"], *["-"] * 5]
    return [
        row["tier"],
        str(row["chunks"]),
        size_text(row["bytes"]),
        "-" if row["capacity"] is None else size_text(row["capacity"]),
        share_text(row["bytes"], row["capacity"]),
        "-" if row["reclaimable"] is None else size_text(row["reclaimable"]),
    ]


def _source_cells(row: Mapping[str, Any], names: Mapping[str, str], *, verbose: bool) -> list[str]:
    cells = [short(row["source"], names), row["tier"], str(row["chunks"]), size_text(row["bytes"])]
    if verbose:
        slots = row["slots"] or dict.fromkeys(_KINDS, 0)
        by_kind = [slots[kind] for kind in _KINDS]
        cells += map(size_text, [*by_kind, row["bytes"] - sum(by_kind)])
    return cells


def _fail(failed: Mapping[str, DroidSpeakError]) -> None:
    """Ends with the first failure's own status, and tells the others."""
    errors = list(failed.values())
    for error in errors[1:]:
        note(f"error: {error}")
    if errors:
        raise errors[0]
