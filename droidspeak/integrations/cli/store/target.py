"""Which store a command works on: the tiers of `--store`, or the configured ones that outlive a process.

Disk tiers are opened without torch, and for a command that changes nothing also without a mark in the folder:
a listing of a live engine's store costs the engine nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from droidspeak.errors import DroidSpeakError, NotFound, TierUnavailable, UsageError
from droidspeak.integrations.cli.store.names import names_in
from droidspeak.integrations.cli.store.selecting import selection_of
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.tier import ChunkRecord, Tier
from droidspeak.storage.urls import open_tier, tier_options

if TYPE_CHECKING:
    from droidspeak.config import Settings

__all__ = ["ConfigOption", "StoreOption", "Target", "descriptions", "open_target", "require_store"]

StoreOption = Annotated[
    list[str] | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Tier to work on, repeatable, fast ones first: disk:///path, s3://bucket/prefix,"
        " droidspeak://host:port. Those of the configuration if not given.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration; DROIDSPEAK_CONFIG if not given."),
]

_OF_ONE_PROCESS = ("cpu", "gpu")


class Target:
    """The tiers that a command works on; closes them at its end.

    Attributes:
        tiers: by name, from fast to slow.
        failed: why others could not be opened, by name; only where the command goes on without them.
    """

    def __init__(self, config: Path | None) -> None:
        self.tiers: dict[str, Tier] = {}
        self.failed: dict[str, DroidSpeakError] = {}
        self._config = config
        self._open = ExitStack()

    def add(self, tier: Tier) -> None:
        """Takes `tier` over."""
        self.tiers[tier.name] = self._open.enter_context(tier)

    @cached_property
    def settings(self) -> Settings:
        """The configuration."""
        from droidspeak.config import load_settings

        return load_settings(self._config)

    @cached_property
    def policies(self) -> Path | None:
        """The folder of policy files, if one is configured."""
        told = {"DROIDSPEAK_CONFIG", "DROIDSPEAK_POLICIES"}
        # Reading the configuration takes as long as the rest of a short listing.
        if self._config is None and not told & {name.upper() for name in os.environ}:
            return None
        return self.settings.policies

    @cached_property
    def names(self) -> dict[str, str]:
        """The names that policy files give to source ids."""
        return names_in(self.policies)

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        """The records that `selection` asks for; a chunk comes once for each tier that has it."""
        return selection.merge([tier.select(selection) for tier in self.tiers.values()])

    def selection(
        self, filters: Sequence[str], *, sort: str | None = None, limit: int | None = None
    ) -> Selection:
        """What `--filter`, `--sort` and `--limit` ask for of these tiers. Raises as `selection_of`."""
        names = [*self.tiers, *self.failed]
        return selection_of(filters, tiers=names, models=lambda: self.names, sort=sort, limit=limit)

    def find(self, text: str) -> ChunkKey:
        """The key that begins with `text`: a whole key, or the first digits of its link or source.

        Raises:
            NotFound: no tier holds such a chunk.
            UsageError: several do, or `text` is no beginning of a key.
        """
        found = {record.info.key for record in self.select(_beginning(text))}
        if not found:
            raise NotFound(f"no chunk {text} in {', '.join(self.tiers)}")
        if len(found) > 1:
            raise UsageError(f"{text} is the beginning of several keys; allowed is that of one")
        return found.pop()

    def close(self) -> None:
        """Closes the tiers."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_target(
    store: list[str] | None,
    config: Path | None = None,
    *,
    change: bool = False,
    create: bool = False,
    tolerant: bool = False,
) -> Target:
    """The tiers of `store`, opened.

    Args:
        store: URLs; those of the configuration if there are none.
        config: configuration file.
        change: for a command that changes what is stored.
        create: disk tiers that are not there are made.
        tolerant: what cannot be opened is left out, and why is in `failed`.

    Raises:
        UsageError: no such tier, or none that outlives a process.
        NotFound: a disk tier's folder that is no store.
        TierUnavailable: a tier that cannot be opened.
    """
    target = Target(config)
    with ExitStack() as undo:
        undo.callback(target.close)
        for options in descriptions(store, target):
            try:
                target.add(_opened(options, change=change, create=create))
            except (NotFound, TierUnavailable) as error:
                if not tolerant:
                    raise
                target.failed[options["name"]] = error
        undo.pop_all()
    return target


def descriptions(store: list[str] | None, target: Target) -> list[dict[str, Any]]:
    """The tiers of `store`, or of the configuration of `target`, as mappings; their names all differ.

    Raises:
        UsageError: no such tier, or none that outlives a process.
    """
    return _named([tier_options(url) for url in store] if store else _configured(target))


def _configured(target: Target) -> list[dict[str, Any]]:
    described = [tier_options(tier) for tier in target.settings.tiers]
    lasting = [options for options in described if options["type"] not in _OF_ONE_PROCESS]
    if not lasting:
        raise UsageError(
            "the configured tiers end with their process; name one that does not with --store URL"
        )
    return lasting


def _named(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with names that are all different."""
    names: set[str] = set()
    named = []
    for options in given:
        kind = {"droidspeak": "remote"}.get(options["type"], options["type"])
        wanted = str(options.get("name") or kind)
        tries = (f"{wanted}-{n}" if n > 1 else wanted for n in count(1))
        names.add(name := next(name for name in tries if name not in names))
        named.append({**options, "name": name})
    return named


def _opened(options: dict[str, Any], *, change: bool, create: bool) -> Tier:
    if options["type"] in _OF_ONE_PROCESS:
        raise UsageError(
            f"{options['type']}:// ends with its process; allowed: disk://, s3://, droidspeak://"
        )
    if options["type"] != "disk":
        return open_tier(options)
    if not create:
        require_store(str(options.get("path", "")))
    if change:
        return open_tier(options)
    try:
        return open_tier({**options, "read_only": True})
    except TierUnavailable:
        # Without a catalog, or with an older one: opening it for writing makes one.
        return open_tier(options)


def require_store(path: str) -> None:
    """Raises `NotFound` if the folder of a disk tier at `path` is no store."""
    try:
        root = Path(path).expanduser()
    except RuntimeError:  # a home that cannot be found; opening the tier tells it better
        return
    known = (root / "catalog.sqlite").exists() or (root / "chunks").is_dir()
    # Opening would make a folder that is missing, and a mistyped path a store.
    if root.is_absolute() and not known:
        raise NotFound(f"no store in {root}")


def _beginning(text: str) -> Selection:
    source, *rest = text.split("/")
    if not text or len(rest) > 2 or set(source) - set("0123456789abcdef"):
        raise UsageError(f"not a key: {text!r}; allowed is SOURCE/SHARD/LINK, or the first digits of a link")
    if not rest:
        return Selection((Condition("prefix", "=", (source,)),))
    if len(rest) < 2:
        raise UsageError(f"not a key: {text!r}; allowed is SOURCE/SHARD/LINK, or the first digits of a link")
    parts = Condition("source", "=", (source,)), Condition("shard", "=", rest[0])
    return Selection((*parts, Condition("prefix", "=", (rest[1],))))
