"""What one connector may do, and how much of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from droidspeak.connector.shards import Shard
from droidspeak.errors import ConfigError
from droidspeak.storage.codecs import get_codec
from droidspeak.storage.keys import DEFAULT_CHUNK_SIZE, PrefixHasher

__all__ = ["ConnectorOptions"]


@dataclass(frozen=True)
class ConnectorOptions:
    """How chunks are cut, coded, loaded and saved.

    Attributes:
        chunk_size: tokens per chunk; sender and receiver must agree.
        codec: of what this process saves; everything can be read.
        load_deadline: seconds until a stream gives up.
        loaders: threads per stream.
        load_memory: bytes of host memory that are kept from one load for the next.
        save_backlog: bytes that may wait to be saved; what comes beyond is not saved.
        shard: this process's tensor-parallel shard.
        degrees: tensor-parallel degrees of other engines whose chunks are read too, where there are none of
            its own degree; each costs a question on a miss.
        report_interval: seconds between the reports that are left beside the store; 0 for none.

    Raises:
        UsageError, ConfigError: a value that is not allowed.
    """

    chunk_size: int = DEFAULT_CHUNK_SIZE
    codec: str = "raw"
    load_deadline: float = 30.0
    loaders: int = 2
    load_memory: int = 256 << 20
    save_backlog: int = 1 << 30
    shard: str = "0of1"
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    report_interval: float = 5.0

    def __post_init__(self) -> None:
        PrefixHasher(self.chunk_size)
        if not get_codec(self.codec).lossless:
            raise ConfigError(f"codec {self.codec!r} is lossy: allowed only with a policy profiled with it")
        if self.loaders < 1 or not self.load_deadline > 0:
            raise ConfigError(
                f"{self.loaders} loaders, deadline {self.load_deadline} s: allowed are positive numbers"
            )
        if self.load_memory < 0:
            raise ConfigError(f"load memory of {self.load_memory} bytes: allowed are 0 and positive numbers")
        Shard.parse(self.shard)
        if not 0 <= self.report_interval < math.inf:
            raise ConfigError(f"report interval {self.report_interval} s: allowed are 0 and positive numbers")
        if any(degree < 1 for degree in self.degrees):
            raise ConfigError(f"tensor-parallel degrees {list(self.degrees)}: allowed are numbers above 0")
