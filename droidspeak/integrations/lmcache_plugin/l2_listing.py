"""Pages of the objects that a store holds for LMCache, in the order of their chunk keys."""

from __future__ import annotations

from lmcache.v1.distributed.api import ObjectKey

from droidspeak.errors import StorageError, UsageError
from droidspeak.integrations.lmcache_plugin.l2_objects import object_named_by
from droidspeak.integrations.lmcache_plugin.l2_residents import Residents
from droidspeak.storage import ChunkKey, Tier

__all__ = ["list_objects"]

_MOST = 1000


def list_objects(
    store: Tier, residents: Residents, model: str | None, page_size: int, cursor: str | None
) -> tuple[list[tuple[ObjectKey, int]], str | None]:
    """Objects and their sizes, and the cursor of the next page.

    Args:
        residents: objects that are known; the others are asked for their names.
        model: only this model's.
        page_size: objects at most; no more than a thousand are given.
        cursor: of the page before; `None` for the first.

    Raises:
        UsageError: a page size or a cursor that is not allowed.
        TierUnavailable, TierTimeout: the store cannot be listed.
    """
    if page_size <= 0:
        raise UsageError(f"page_size of {page_size}; allowed are numbers above 0")
    after = ChunkKey.parse(cursor) if cursor is not None else None
    page: list[tuple[ObjectKey, int]] = []
    for chunk in sorted(key for key in set(store.keys()) if after is None or key > after):
        if len(page) == min(page_size, _MOST):
            return page, str(after)
        after = chunk
        listed = _object(store, residents, chunk)
        if listed and model in (None, listed[0].model_name):
            page.append(listed)
    return page, None


def _object(store: Tier, residents: Residents, chunk: ChunkKey) -> tuple[ObjectKey, int] | None:
    try:
        found = store.read(chunk, [])
    except StorageError:
        return None
    if found is None:
        return None
    key = residents.named(chunk) or object_named_by(found.header)
    size = sum(record.nbytes for record in found.header.records.values())
    return (key, size) if key else None
