"""What the two halves of the connector tell each other, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from droidspeak.connector import Match, Reason
from droidspeak.integrations.vllm_connector.tables import Tables
from droidspeak.storage import SourceManifest

__all__ = ["LoadOrder", "LoadReport", "Reports", "SaveOrder", "StepOrders"]


@dataclass(frozen=True)
class LoadOrder:
    """Bring the chunks of `match` into the blocks of a request.

    Attributes:
        first: leading tokens that are in the blocks already, from the engine's own prefix cache.
        tables: the request's blocks, at least as far as `match` goes.
        token_ids: of the prompt, as far as `match` goes.
        background: between the steps, not within this one.
        adapter: the request's LoRA in vLLM's numbers, 0 for none.
    """

    request_id: str
    match: Match
    first: int
    tables: Tables
    token_ids: tuple[int, ...]
    background: bool
    adapter: int = 0

    @property
    def end(self) -> int:
        """Tokens that are in the blocks afterwards."""
        return self.match.tokens


@dataclass(frozen=True)
class SaveOrder:
    """Keep whole chunks that this step completes.

    Attributes:
        source: the model that computed them.
        token_ids: of the prompt.
        chunks: indices of the chunks.
        tables: the request's blocks, at least to the last chunk's end.
    """

    request_id: str
    source: SourceManifest
    salt: str
    token_ids: tuple[int, ...]
    chunks: range
    tables: Tables


@dataclass
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to each worker."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)


@dataclass(frozen=True)
class LoadReport:
    """How a load ended on a worker: with `failure`, or with all in place.

    Attributes:
        bytes_loaded, wait_seconds: as of `droidspeak.connector.Outcome`.
    """

    bytes_loaded: int
    wait_seconds: float
    failure: Reason | None = None

    def merged(self, other: LoadReport) -> LoadReport:
        """Of both workers together."""
        failures = [failure for failure in (self.failure, other.failure) if failure is not None]
        # A rank that stops because another one failed says `store_unavailable`: the other knows more.
        failures.sort(key=lambda failure: failure is Reason.STORE_UNAVAILABLE)
        return LoadReport(
            self.bytes_loaded + other.bytes_loaded,
            max(self.wait_seconds, other.wait_seconds),
            failures[0] if failures else None,
        )


@dataclass
class Reports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers to the scheduler: loads that ended in this step, by request."""

    loads: dict[str, LoadReport] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        """Of two workers."""
        assert isinstance(other, Reports)
        merged = dict(self.loads)
        for request_id, report in other.loads.items():
            merged[request_id] = merged[request_id].merged(report) if request_id in merged else report
        return Reports(merged)
