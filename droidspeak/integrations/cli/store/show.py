"""`droidspeak store show`: all that is known of one chunk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from droidspeak.errors import NotFound, StorageError
from droidspeak.integrations.cli.output import Format, FormatOption, note, show_document, show_table
from droidspeak.integrations.cli.store.names import short
from droidspeak.integrations.cli.store.showing import age_text, iso_time, parse_iso_time, size_text, slots_row
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, Target, open_target
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.tier import ChunkRecord, Tier

if TYPE_CHECKING:
    from droidspeak.layerselect import Policy
    from droidspeak.storage.container import ChunkHeader, SlotRecord

__all__ = ["show"]

_Key = Annotated[
    str, typer.Argument(help="SOURCE/SHARD/LINK, or the first digits of a link if one has them.")
]


def show(
    key: _Key,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show a chunk: its slots, the tiers that hold it, and the policies that can use it."""
    with open_target(store, config) as target:
        found = target.find(key)
        records = list(target.select(_exactly(found)))
        header = _header(target, found)
        if header is None or not records:
            raise NotFound(f"chunk {found} has just left")
        content = _content(header, records, target)
        show_document(format, content, lambda: _show(content, target.names))
        if format is Format.QUIET:
            print(found)


def _exactly(key: ChunkKey) -> Selection:
    parts = Condition("source", "=", (key.source,)), Condition("shard", "=", key.shard)
    return Selection((*parts, Condition("prefix", "=", (key.prefix,))))


def _header(target: Target, key: ChunkKey) -> ChunkHeader | None:
    """The header, of the first tier that has a sound one. Raises what went wrong if none has."""
    failure: StorageError | None = None
    for name, tier in target.tiers.items():
        try:
            if header := _read_header(tier, key):
                return header
        except StorageError as error:
            note(f"tier {name}: {error}")
            failure = failure or error
    if failure:
        raise failure
    return None


def _read_header(tier: Tier, key: ChunkKey) -> ChunkHeader | None:
    # No slot is asked for: a tier reads the header only. Nobody has used the chunk by looking at it.
    chunk = tier.read(key, ())
    return None if chunk is None else chunk.header


def _content(header: ChunkHeader, records: Iterable[ChunkRecord], target: Target) -> dict[str, Any]:
    key = header.key
    return {
        "version": 1,
        "key": str(key),
        "source": key.source,
        "model": target.names.get(key.source),
        "shard": key.shard,
        "prefix": key.prefix,
        "tokens": header.tokens,
        "bytes": header.nbytes,
        "header_bytes": header.data_start,
        "digest": header.digest,
        "codec": header.codec,
        "salt": header.labels.get("salt", ""),
        "labels": dict(header.labels),
        "kv_layers": list(header.kv_layers),
        "e_layers": list(header.e_layers),
        "slot_bytes": slots_row(header.slot_bytes),
        "slots": [_slot(record) for record in header.records.values()],
        "tiers": [_held(record) for record in records],
        "policies": _policies(header, target),
    }


def _slot(record: SlotRecord) -> dict[str, Any]:
    return {
        "slot": record.slot.name,
        "dtype": str(record.dtype).removeprefix("torch."),
        "shape": list(record.shape),
        "codec": record.codec,
        "bytes": record.nbytes,
        "xxh3_64": f"{record.checksum:016x}",
    }


def _held(record: ChunkRecord) -> dict[str, Any]:
    return {
        "tier": record.info.tier,
        "bytes": record.info.nbytes,
        "created": iso_time(record.created),
        "used": iso_time(record.used),
        "hits": record.hits,
        "pinned": record.pinned,
    }


def _policies(header: ChunkHeader, target: Target) -> list[dict[str, Any]]:
    """The policies for caches of this chunk's source, and which of their plans find the E that they need."""
    if target.policies is None:
        return []
    from droidspeak.layerselect import PolicySet

    policies = PolicySet.from_folder(target.policies).for_sender(header.key.source)
    return [_policy(policy, header, target.names) for policy in policies]


def _policy(policy: Policy, header: ChunkHeader, names: Mapping[str, str]) -> dict[str, Any]:
    held = set(header.e_layers)
    plans = [
        {
            "plan": str(point.plan),
            "quality": point.quality,
            "missing_e": sorted(set(point.plan.transition_layers) - held),
        }
        for point in policy.frontier
    ]
    return {
        "receiver": policy.receiver,
        "model": names.get(policy.receiver),
        "usable": len(header.kv_layers) == policy.layers and any(not plan["missing_e"] for plan in plans),
        "plans": plans,
    }


# The table


def _show(content: Mapping[str, Any], names: Mapping[str, str]) -> None:
    facts = {
        "key": content["key"],
        "model": short(content["source"], names),
        "tokens": str(content["tokens"]),
        "size": f"{size_text(content['bytes'])}, header {size_text(content['header_bytes'])}",
        "codec": content["codec"],
        "digest": content["digest"],
        "salt": content["salt"] or "none",
        **{f"label {name}": value for name, value in content["labels"].items() if name != "salt"},
        "K and V": f"layers {spans(content['kv_layers'])}",
        "E": f"layers {spans(content['e_layers'])}",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    print()
    show_table("Slots", ["slots", "dtype", "shape", "codec", "size"], _slot_cells(content["slots"]))
    print()
    now = time.time_ns()
    held = [_held_cells(row, now) for row in content["tiers"]]
    show_table("Tiers", ["tier", "created", "used", "hits", "pinned"], held)
    if content["policies"]:
        print()
        rows = [_policy_cells(row, names) for row in content["policies"]]
        show_table("Policies", ["receiver", "usable", "plans", "best quality", "missing E"], rows)


def _slot_cells(slots: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Slots that are alike in one row."""
    layers: dict[tuple[str, ...], list[int]] = {}
    nbytes: dict[tuple[str, ...], int] = {}
    for slot in slots:
        kind, _, layer = slot["slot"].partition(".")
        alike = kind, slot["dtype"], "x".join(map(str, slot["shape"])), slot["codec"]
        layers.setdefault(alike, []).append(int(layer))
        nbytes[alike] = nbytes.get(alike, 0) + slot["bytes"]
    return [
        [f"{alike[0]} {spans(found)}", *alike[1:], size_text(nbytes[alike])]
        for alike, found in layers.items()
    ]


def _held_cells(row: Mapping[str, Any], now: int) -> list[str]:
    times = [row[name] for name in ("created", "used")]
    ages = ["-" if told is None else f"{age_text(parse_iso_time(told), now)} ago" for told in times]
    pinned = {True: "yes", False: "no", None: "-"}[row["pinned"]]
    return [row["tier"], *ages, "-" if row["hits"] is None else str(row["hits"]), pinned]


def _policy_cells(row: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    usable = [plan for plan in row["plans"] if not plan["missing_e"]]
    missing = sorted({layer for plan in row["plans"] for layer in plan["missing_e"]})
    best = max((plan["quality"] for plan in usable), default=None)
    return [
        short(row["receiver"], names),
        "yes" if row["usable"] else "no",
        f"{len(usable)} of {len(row['plans'])}",
        "-" if best is None else f"{best:.3f}",
        spans(missing),
    ]


def spans(layers: Iterable[int]) -> str:
    """`0-3, 7`; `none` of no layers."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in found) or "none"
