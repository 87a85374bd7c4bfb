"""LMCache's engine as the in-process plug-ins see it; LMCache is imported here, or asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from droidspeak.errors import MissingExtra
from droidspeak.integrations.lmcache_plugin.objects import Expected, Layout

try:
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface
    from lmcache.v1.storage_backend.connector import (
        ConnectorAdapter,
        ConnectorContext,
        SafeLocalCPUBackend,
        extract_plugin_type,
    )
    from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
except ModuleNotFoundError as error:
    # A module that LMCache itself lacks is another matter.
    if error.name != "lmcache":
        raise
    raise MissingExtra("the LMCache plug-in", "lmcache") from None

__all__ = [
    "LAYERWISE_LOOKUP",
    "ConnectorAdapter",
    "ConnectorContext",
    "RemoteConnector",
    "StoragePluginInterface",
    "allocate_in",
    "buffer_bytes",
    "expected_by",
    "extract_plugin_type",
    "warn_of_local_cpu",
]

# The id with which LMCache's layerwise retrieve asks; lookups that load ahead have ids of requests.
LAYERWISE_LOOKUP = "fake_lookup_id"
_GIB = 1 << 30
_log = logging.getLogger(__name__)


def expected_by(config: Any, metadata: Any) -> Expected:
    """What the engine can use."""
    return Expected(metadata, "KV_2TD" if config.enable_blending else "KV_T2D")


def buffer_bytes(config: Any) -> int:
    """Bytes of LMCache's host memory, from which all memory objects come."""
    return int(config.max_local_cpu_size * _GIB)


def allocate_in(local_cpu_backend: Any) -> Callable[[Layout], Any]:
    """Allocates in LMCache's buffer; it evicts from LMCache's own cache, and does not wait.

    The scheduler's process has no buffer, or one that only raises: there is never room.
    """
    if isinstance(local_cpu_backend, SafeLocalCPUBackend):
        local_cpu_backend = None

    def allocate(layout: Layout) -> Any:
        if local_cpu_backend is None:
            return None
        shapes = [torch.Size(shape) for _, shape in layout.parts]
        dtypes = [dtype for dtype, _ in layout.parts]
        fmt = MemoryFormat[layout.fmt]
        return local_cpu_backend.allocate(shapes, dtypes, fmt, eviction=True, busy_loop=False)

    return allocate


def warn_of_local_cpu(config: Any) -> None:
    """LMCache ends a layerwise retrieve with an assertion when a prefix lies in two places."""
    if config.use_layerwise and config.local_cpu:
        _log.warning("use_layerwise needs local_cpu: false: LMCache cannot retrieve layers from two places")
