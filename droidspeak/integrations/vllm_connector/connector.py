"""The class that vLLM loads: `--kv-transfer-config '{"kv_connector": "DroidSpeakConnector", ...}'`.

It exists twice, in vLLM's scheduler and in each worker, and hands every call to its half.
Source: vllm/distributed/kv_transfer/kv_connector/v1/base.py of 0.32.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from droidspeak.config import Settings, open_policies
from droidspeak.config.opening import open_store_from, release_store, settings_from
from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.integrations.vllm_connector.identity import Identities
from droidspeak.integrations.vllm_connector.messages import Reports, StepOrders
from droidspeak.integrations.vllm_connector.metrics import (
    ConnectorMetrics,
    ConnectorStats,
    logged,
    outcome_key,
)
from droidspeak.integrations.vllm_connector.sampling import EngineSamples, Sampler, StepStats
from droidspeak.integrations.vllm_connector.saving import captured_layers
from droidspeak.integrations.vllm_connector.scheduling import SchedulerHalf
from droidspeak.integrations.vllm_connector.support import unsupported
from droidspeak.integrations.vllm_connector.tables import keeps_all
from droidspeak.integrations.vllm_connector.working import WorkerHalf

if TYPE_CHECKING:
    import torch

__all__ = ["DroidSpeakConnector"]


class DroidSpeakConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One engine's way to the store.

    `kv_connector_extra_config` takes every key of `droidspeak.config.Settings`, and `config` for a file.

    Raises:
        ConfigError, PolicyError: in one line, when vLLM starts.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._unsupported = unsupported(vllm_config, kv_cache_config)
        extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        settings = settings_from(extra)
        self._store = open_store_from(extra)
        tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
        rank = _rank() if role is KVConnectorRole.WORKER else 0
        self._connector = Connector(
            self._store,
            open_policies(settings),
            _options(settings, f"{rank}of{tensor_parallel}"),
            engine="vllm",
        )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = self._scheduler_half(vllm_config, kv_cache_config, settings)
        else:
            self._worker = WorkerHalf(
                vllm_config, kv_cache_config, self._connector, _agreement(tensor_parallel)
            )
        self._stats = self._step_stats(vllm_config.parallel_config.rank)

    def _scheduler_half(self, vllm_config: Any, kv_cache_config: Any, settings: Settings) -> SchedulerHalf:
        transfer = vllm_config.kv_transfer_config
        return SchedulerHalf(
            self._connector,
            Identities(vllm_config, self._unsupported),
            requirement=settings.requirement,
            salt=settings.salt,
            saves=transfer.is_kv_producer,
            loads=transfer.is_kv_consumer,
            captured=captured_layers(vllm_config),
            background=settings.vllm.load == "async",
            by_blocks=keeps_all(kv_cache_config),
            mixes_adapters=vllm_config.lora_config is not None and _on_cpu(),
        )

    def _step_stats(self, rank: int) -> StepStats:
        worker = self._worker
        samples = EngineSamples(
            self._store,
            "" if worker is None else f"worker {rank}",
            lambda: None if worker is None else worker.saving,
        )
        return StepStats(self._connector, Sampler(samples.take))

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose what it is given."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:  # noqa: ARG003
        """Layers are awaited one by one, which a whole-model graph would skip."""
        return True

    # In the scheduler

    @property
    def _half(self) -> SchedulerHalf:
        assert self._scheduler is not None, "a call for the scheduler's connector"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._half.cache_manager = kv_cache_manager

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._half.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._half.allocated(request, tuple(map(tuple, blocks.get_block_ids())), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        return self._half.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._stats.hear(connector_output.kv_connector_stats)
        reports = connector_output.kv_connector_worker_meta
        self._half.ended(
            reports if isinstance(reports, Reports) else None, set(connector_output.invalid_block_ids or ())
        )

    def request_finished_all_groups(
        self,
        request: Any,
        block_ids: tuple[list[int], ...],  # noqa: ARG002 - saved blocks were copied in their own step
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half.finished(request)

    # In a worker

    @property
    def _hands(self) -> WorkerHalf:
        assert self._worker is not None, "a call for a worker's connector"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._unsupported is None:
            self._hands.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._hands.start(self._step_orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._hands.wait(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole chunks are copied after the forward."""

    def wait_for_save(self) -> None:
        self._hands.save(self._step_orders())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        received = self._hands.finished(finished_req_ids)
        return KVConnectorTransferResults(finished_recving=received, failed_recving=self._hands.lost())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._hands.broken_blocks()

    def build_connector_worker_meta(self) -> Reports | None:
        return self._hands.reports()

    def _step_orders(self) -> StepOrders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, StepOrders)
        return orders

    # In both

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        stats = self._stats.next()
        if self._scheduler is None or not (outcomes := self._scheduler.outcomes()):
            return stats
        told = ConnectorStats(data={outcome_key(name): outcome for name, outcome in outcomes.items()})
        return told if stats is None else stats.aggregate(told)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats | None:
        return logged(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> ConnectorMetrics:
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        self._stats.close()
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.count_ended()
        self._connector.close()
        release_store(self._store)


def _options(settings: Settings, shard: str) -> ConnectorOptions:
    return replace(settings.connector_options, shard=shard)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _agreement(tensor_parallel: int) -> Any:
    if tensor_parallel == 1:
        return lambda well: well

    def agree(well: bool) -> bool:
        import torch
        from vllm.distributed.parallel_state import get_tp_group

        votes = torch.tensor([int(well)])
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
        return bool(votes.item())

    return agree
