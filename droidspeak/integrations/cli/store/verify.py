"""`droidspeak store verify`: looks for damage, and repairs it if asked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from droidspeak.errors import StorageError, UsageError
from droidspeak.integrations.cli.output import (
    Column,
    Format,
    FormatOption,
    note,
    show_document,
    show_rows,
)
from droidspeak.integrations.cli.store.bytebar import byte_bar
from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.integrations.cli.store.target import (
    ConfigOption,
    StoreOption,
    Target,
    descriptions,
    require_store,
)
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.tier import Tier
from droidspeak.storage.urls import open_tier
from droidspeak.storage.verify import Finding, VerifyCounts, VerifyOptions, verify_tier
from droidspeak.storage.verifydisk import verify_folder

__all__ = ["findings_of", "parse_share", "verify"]

FINDINGS = 3
_SHARE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) *(%?)")


def _shortened(place: str, width: int = 44) -> str:
    """The end of a path or key says which chunk it is."""
    return place if len(place) <= width else f"...{place[-width:]}"


_COLUMNS = [
    Column("tier", "tier"),
    Column("kind", "finding"),
    Column("place", "place", _shortened),
    Column("bytes", "size", size_text, right=True),
    Column("repair", "repair"),
    Column("detail", "detail"),
]


def verify(
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Every byte against its checksum, or headers and sizes.")
    ] = False,
    sample: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Only a random share of the chunks, such as 5%.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Quarantine what is damaged, drop rows without files, adopt sound files without rows.",
        ),
    ] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Look for damage; also beside a running engine or daemon. Exit status 3 if something is found."""
    options = VerifyOptions(full=full, sample=parse_share(sample), repair=repair)
    with Target(config) as target:
        look = _Look(options)
        found = look.at(descriptions(store, target), "Verifying")
        count = _show(format, found, look)
    note(look.summary(count, time.monotonic()))
    if look.failures:
        raise look.failures[0]
    if count:
        raise typer.Exit(FINDINGS)


def parse_share(text: str | None) -> float:
    """The share that `5%` or `0.05` names; 1 of `None`. Raises `UsageError`."""
    if text is None:
        return 1.0
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--sample {text}: allowed is a share above 0 and up to 1, such as 5% or 0.05")
    return share


def findings_of(options: Mapping[str, Any], verify: VerifyOptions, counts: VerifyCounts) -> Iterator[Finding]:
    """Findings of the tier that `options` describe.

    Raises:
        NotFound: a disk tier's folder that is no store.
        StorageError: the tier cannot be asked.
    """
    if options["type"] == "disk":
        require_store(str(options.get("path", "")))
        root = Path(options["path"]).expanduser()
        yield from verify_folder(root, options["name"], verify, counts, lambda: _folder_tier(options))
        return
    with open_tier(options) as tier:
        yield from verify_tier(tier, verify, counts)


def _folder_tier(options: Mapping[str, Any]) -> DiskTier:
    tier: Tier = open_tier(options)
    assert isinstance(tier, DiskTier)
    return tier


@dataclass
class _Look:
    """A look at several tiers.

    Attributes:
        failures: of tiers that could not be looked at.
    """

    options: VerifyOptions
    counts: VerifyCounts = field(default_factory=VerifyCounts)
    failures: list[StorageError] = field(default_factory=list)
    repaired: int = 0
    started: float = field(default_factory=time.monotonic)

    def at(self, tiers: Iterable[Mapping[str, Any]], title: str) -> Iterator[dict[str, Any]]:
        """Rows of what is found in `tiers`."""
        with byte_bar(title, None) as moved:
            counts = _Watched(moved)
            self.counts = counts
            for options in tiers:
                try:
                    for finding in findings_of(options, self.options, counts):
                        self.repaired += finding.repair is not None
                        yield _row(finding)
                except StorageError as error:
                    note(f"tier {options['name']}: {error}")
                    self.failures.append(error)

    def summary(self, found: int, now: float) -> str:
        """One line for people."""
        seconds = max(now - self.started, 1e-9)
        how = "read in full" if self.options.full else "headers"
        share = "" if self.options.sample == 1 else f" (a sample of {100 * self.options.sample:g} %)"
        rate = f", {size_text(int(self.counts.nbytes / seconds))}/s" if self.options.full else ""
        told = f"{found} finding{'' if found == 1 else 's'}" if found else "nothing found"
        repaired = f", {self.repaired} of them repaired" if self.options.repair and found else ""
        return (
            f"{told}{repaired}; {self.counts.chunks} chunks{share}, {size_text(self.counts.nbytes)} {how}"
            f" in {seconds:.1f} s{rate}"
        )


class _Watched(VerifyCounts):
    """Counts that move a bar."""

    def __init__(self, moved: Callable[[int], None]) -> None:
        super().__init__()
        self._moved = moved

    def add(self, nbytes: int) -> None:
        self.chunks += 1
        self.nbytes += nbytes
        self._moved(nbytes)


def _row(finding: Finding) -> dict[str, Any]:
    row = asdict(finding)
    row["key"] = str(finding.key) if finding.key else None
    row["bytes"] = row.pop("nbytes")
    return row


def _show(format: Format, found: Iterator[dict[str, Any]], look: _Look) -> int:
    if format is not Format.JSON:
        return show_rows(format, found, _COLUMNS, name="findings", quiet="place")
    findings = list(found)
    document = {
        "version": 1,
        "full": look.options.full,
        "sample": look.options.sample,
        "chunks": look.counts.chunks,
        "bytes": look.counts.nbytes,
        "repaired": look.repaired,
        "findings": findings,
    }
    show_document(format, document, lambda: None)
    return len(findings)
