"""`droidspeak store pin` and `unpin`: chunks that are never evicted."""

from __future__ import annotations

from droidspeak.integrations.cli.output import Format, FormatOption
from droidspeak.integrations.cli.store.keys import KeysArgument, change_each
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, open_target

__all__ = ["pin", "unpin"]


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
