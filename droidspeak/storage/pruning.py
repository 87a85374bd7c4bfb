"""Taking chunks out of a tier by rule: what would leave, and letting it leave.

plan      goes through the tier once and counts
carry_out goes through it once more, and what still meets the rule leaves; a chunk that was used, pinned or
          replaced since it was listed stays
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.selection import Selection
from droidspeak.storage.tier import ChunkRecord, Tier

__all__ = ["PruneRule", "Tally", "carry_out", "plan"]

# So many leave at a time; on disk, other processes wait for them.
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class PruneRule:
    """What shall leave a tier: of the chunks that meet all of it, those used longest ago first.

    Attributes:
        selection: conditions; its order and limit are not used.
        unused_since: last used before this, in ns since the epoch. Where a tier does not note uses, the time
            of the write stands in; where it knows neither, nothing is old.
        max_size: only as many as must leave for the tier to have no more than so many bytes.
        pinned: pinned chunks too.
    """

    selection: Selection = field(default_factory=Selection)
    unused_since: int | None = None
    max_size: int | None = None
    pinned: bool = False

    def met_by(self, record: ChunkRecord) -> bool:
        """Whether `record` may leave, by what it says itself."""
        if record.pinned and not self.pinned:
            return False
        age = _last_use(record)
        return self.unused_since is None or (age is not None and age < self.unused_since)


@dataclass(slots=True)
class Tally:
    """Chunks and bytes, by source model.

    Attributes:
        kept: chunks that were listed, and stayed because they were used, pinned or replaced since.
    """

    chunks: int = 0
    nbytes: int = 0
    kept: int = 0
    sources: dict[SourceId, tuple[int, int]] = field(default_factory=dict)

    def add(self, record: ChunkRecord) -> None:
        """One more chunk."""
        source, nbytes = record.info.key.source, record.info.nbytes
        self.chunks += 1
        self.nbytes += nbytes
        chunks, held = self.sources.get(source, (0, 0))
        self.sources[source] = chunks + 1, held + nbytes


def plan(tier: Tier, rule: PruneRule) -> Tally:
    """What would leave `tier` now."""
    tally = Tally()
    for record in _meeting(tier, rule):
        tally.add(record)
    return tally


def carry_out(tier: Tier, rule: PruneRule, seen: Callable[[Tally], None] = lambda _tally: None) -> Tally:
    """Lets leave what meets `rule`; what has left.

    Args:
        seen: called from time to time with what has left so far.

    Raises:
        TierUnavailable, TierTimeout: the tier cannot be changed; what has left until then has left.
    """
    tally = Tally()
    gone: set[ChunkKey] = set()
    records = _meeting(tier, rule)
    while batch := list(islice(records, _AT_ONCE)):
        # A tier of tiers lists a chunk once for each that has it, and lets go of all at once.
        listed = {record.info.key: record for record in batch if record.info.key not in gone}
        left = {record.info.key for record in tier.delete_unused(list(listed.values()))}
        if all(record.info.tier in (None, tier.name) for record in batch):
            gone.clear()
        gone |= left
        for record in batch:
            if record.info.key in gone:
                tally.add(record)
            else:
                tally.kept += 1
        seen(tally)
    return tally


def _meeting(tier: Tier, rule: PruneRule) -> Iterator[ChunkRecord]:
    if rule.max_size is None:
        return filter(rule.met_by, tier.select(replace(rule.selection, sort=None, limit=None)))
    excess = tier.usage().nbytes - rule.max_size
    return _until(excess, filter(rule.met_by, _oldest_first(tier, rule.selection)))


def _oldest_first(tier: Tier, selection: Selection) -> Iterator[ChunkRecord]:
    records = tier.select(replace(selection, sort="used", limit=None))
    first = next(records, None)
    if first is None or first.used is not None:
        return chain([first] if first else [], records)
    # Uses are not noted; unknown ones would stand last, so that no use is known.
    return tier.select(replace(selection, sort="created", limit=None))


def _until(excess: int, records: Iterator[ChunkRecord]) -> Iterator[ChunkRecord]:
    while excess > 0 and (record := next(records, None)):
        yield record
        excess -= record.info.nbytes


def _last_use(record: ChunkRecord) -> int | None:
    return record.created if record.used is None else record.used
