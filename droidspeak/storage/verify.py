"""Looking for damage: what a tier holds, against what it says of it.

    corrupt        bytes that differ from their checksum, or a header that cannot be read
    truncated      an object that is shorter than its header says
    wrong_key      an object whose header names another chunk
    orphan_file    a file that no row of the catalog speaks of
    orphan_row     a row whose file is not there
    stale_index    what the index says of a chunk (size, E layers, codec, tokens) is not what its header says
    leftover       what a writer that was killed has left
    unreadable     the system refuses to read it

Nothing is found that another process is changing: each suspect is looked at again (on disk while no other
process can change the folder), and what is as it should be by then, or gone, was no finding.

    quick    headers and sizes
    full     every byte
    sample   a random share of the chunks
    repair   damaged objects are quarantined, rows without files dropped, sound files without rows adopted,
             stale rows renewed
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol, runtime_checkable

from droidspeak.errors import ChunkCorrupt
from droidspeak.storage.container import ChunkHeader
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.spread import spread
from droidspeak.storage.tier import ChunkInfo, Tier

__all__ = [
    "Finding",
    "FindingKind",
    "VerifiesItself",
    "VerifyCounts",
    "VerifyOptions",
    "differences",
    "verify_tier",
]

_THREADS = 8


class FindingKind(StrEnum):
    """What is wrong; the module says what each means."""

    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    WRONG_KEY = "wrong_key"
    ORPHAN_FILE = "orphan_file"
    ORPHAN_ROW = "orphan_row"
    STALE_INDEX = "stale_index"
    LEFTOVER = "leftover"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        tier: name of the tier.
        key: of the chunk, where it is one's.
        place: path below the folder, or the key.
        nbytes: bytes of the object as it is.
        detail: what is wrong, one line.
        repair: what was done: `quarantined`, `removed`, `adopted`, `renewed`, `rebuilt`; `None` if nothing.
    """

    tier: str
    kind: FindingKind
    key: ChunkKey | None
    place: str
    nbytes: int
    detail: str
    repair: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How thoroughly; the module says what each means.

    Attributes:
        sample: share of the chunks, above 0 and up to 1.
        adopt: when repairing, sound files without rows get one; without it they are removed.
        kinds: look for these only; for all if `None`.
    """

    full: bool = False
    sample: float = 1.0
    repair: bool = False
    adopt: bool = True
    kinds: frozenset[FindingKind] | None = None

    def chooser(self) -> Callable[[ChunkKey], bool]:
        """Whether a chunk is in the sample; the same answer each time, another sample each run."""
        if self.sample >= 1:
            return lambda _key: True
        mask, bound = random.getrandbits(32), int(self.sample * 2**32)
        # A prefix is a SHA-256 link, so its digits are as good as drawn by lot.
        return lambda key: int(key.prefix[:8], 16) ^ mask < bound


@dataclass(slots=True)
class VerifyCounts:
    """What has been looked at so far; `nbytes` of headers, or of whole objects if all is read."""

    chunks: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        """One more chunk."""
        self.chunks += 1
        self.nbytes += nbytes


@runtime_checkable
class VerifiesItself(Protocol):
    """A tier that checks where the chunk lies, so that its bytes need not travel."""

    def verify_stored(self, key: ChunkKey) -> str | None:
        """What is wrong with the stored chunk, one line; `None` if nothing is, or if it is gone."""


def verify_tier(tier: Tier, options: VerifyOptions, counts: VerifyCounts) -> Iterator[Finding]:
    """Findings of a tier, through its own methods, as they are found. For a folder see `DiskVerifier`.

    Raises:
        TierUnavailable, TierTimeout: the tier does not answer, so nothing can be said.
    """
    chosen = options.chooser()

    def look(key: ChunkKey) -> tuple[int, Finding | None]:
        # Twice: what was replaced in the middle of the first look is whole in the second.
        found = _look(tier, key, options.full)
        return found if found[1] is None else _look(tier, key, options.full)

    for nbytes, finding in spread(look, filter(chosen, tier.keys()), _THREADS):
        counts.add(nbytes)
        if finding:
            yield _repaired(tier, finding) if options.repair else finding


def _look(tier: Tier, key: ChunkKey, full: bool) -> tuple[int, Finding | None]:
    """Bytes that were looked at, and what is wrong with them."""

    def found(kind: str, nbytes: int, detail: str) -> tuple[int, Finding]:
        return nbytes, Finding(tier.name, FindingKind(kind), key, str(key), nbytes, detail)

    nbytes = 0
    try:
        info = tier.head(key)
        if info is None:
            return 0, None
        nbytes = info.nbytes
        if full and isinstance(tier, VerifiesItself):
            fault = tier.verify_stored(key)
            return found("corrupt", nbytes, fault) if fault else (nbytes, None)
        chunk = tier.read(key, None if full else [])
        if chunk is None:
            return 0, None
        chunk.verify()
    except ChunkCorrupt as error:
        return found(error.kind, nbytes, str(error))
    looked_at = nbytes if full else chunk.header.data_start
    if wrong := differences(info, chunk.header):
        return found("stale_index", looked_at, wrong)
    return looked_at, None


def differences(info: ChunkInfo, header: ChunkHeader) -> str | None:
    """How an index differs from the header that it is of, one line; `None` if it does not."""
    said = {"bytes": info.nbytes, "tokens": info.tokens, "E layers": info.e_layers, "codec": info.codec}
    holds = (header.nbytes, header.tokens, header.e_layers, header.codec)
    wrong = [
        f"{name} {theirs!r} instead of {ours!r}"
        for (name, theirs), ours in zip(said.items(), holds, strict=True)
        if theirs != ours
    ]
    return "the index says " + ", ".join(wrong) if wrong else None


def _repaired(tier: Tier, finding: Finding) -> Finding:
    """The finding after what can be done about it was done."""
    assert finding.key is not None
    if finding.kind is not FindingKind.STALE_INDEX:
        tier.quarantine(finding.key)
        return replace(finding, repair="quarantined")
    chunk = tier.read(finding.key)
    if chunk is None:
        return finding
    tier.write(chunk)
    return replace(finding, repair="renewed")
