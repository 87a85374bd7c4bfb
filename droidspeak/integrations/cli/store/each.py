"""`droidspeak store rm`, `pin` and `unpin`: one change to each chunk that is named."""

from __future__ import annotations

from droidspeak.integrations.cli.output import Format, FormatOption
from droidspeak.integrations.cli.store.keys import KeysArgument, change_each
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, open_target

__all__ = ["pin", "rm", "unpin"]


def rm(
    keys: KeysArgument,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Remove chunks from all tiers, pinned or not. What is not there does not keep the others."""
    with open_target(store, config, change=True) as target:
        change_each(target, keys, lambda tier, key: tier.delete(key), format)


def pin(
    keys: KeysArgument,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Keep chunks from eviction, in every tier that holds them."""
    with open_target(store, config, change=True) as target:
        change_each(target, keys, lambda tier, key: tier.pin(key), format)


def unpin(
    keys: KeysArgument,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Allow eviction of chunks again."""
    with open_target(store, config, change=True) as target:
        change_each(target, keys, lambda tier, key: tier.unpin(key), format)
