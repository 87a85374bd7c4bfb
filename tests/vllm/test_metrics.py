"""What travels from the connector to vLLM's `/metrics`, by vLLM's own classes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from droidspeak import __version__
from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.errors import ChunkCorrupt
from droidspeak.layerselect import PolicySet
from droidspeak.storage import Architecture, Counters, Limits, SourceManifest, Tier, TieredStore, TierUsage
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.tier import TierQueue
from droidspeak.storage.urls import open_tier
from droidspeak.telemetry.table import METRICS

from .processes import free_port
from .stores import wait_for

# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = {"model_name": "m", "engine": "0"}


def exporter():
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from droidspeak.integrations.vllm_connector.metrics import ConnectorMetrics

    unregister_vllm_metrics()
    config = SimpleNamespace(kv_transfer_config=None)
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    return ConnectorMetrics(config, types, list(ENGINE), {0: list(ENGINE.values())})


def samples() -> dict[str, dict[tuple[str, ...], float]]:
    """By name and the values of our own labels, in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
        for sample in family.samples:
            if "droidspeak" in sample.name and not sample.name.endswith("_created"):
                assert {name: sample.labels.pop(name) for name in ENGINE} == ENGINE
                found.setdefault(sample.name, {})[
                    tuple(value for _, value in sorted(sample.labels.items()))
                ] = sample.value
    return found


def counted() -> Counters:
    counters = Counters()
    counters.add("reasons", "cross_model_hit", 2)
    counters.add("requests", "applied", 2)
    counters.add("shared_tokens", "f" * 64, 96)
    counters.add("hit_tokens", "aaaaaaaaaaaa bbbbbbbbbbbb", 96)
    counters.add("layers", "reuse", 6)
    counters.add("load_bytes", "disk", 1 << 20)
    counters.add("load_ns", "disk", 1_500_000_000)
    counters.add("lookup_failures")
    counters.observe("lookup", 0.003)
    return counters


def test_increments_become_the_metrics_of_the_table():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats

    metrics, counters = exporter(), counted()
    for _step in range(2):
        stats = ConnectorStats.since_last(counters)
        assert stats is not None
        metrics.observe(stats.data)
        assert ConnectorStats.since_last(counters) is None
        counters.add("layers", "reuse", 1)
    found = samples()
    assert found["droidspeak_requests_total"] == {("cross_model_hit", "applied"): 2}
    assert found["droidspeak_hit_tokens_total"] == {("bbbbbbbbbbbb", "aaaaaaaaaaaa"): 96}
    assert found["droidspeak_plan_layers_total"] == {("reuse",): 7}
    assert found["droidspeak_load_bytes_total"] == {("disk",): 1 << 20}
    assert found["droidspeak_load_seconds_total"] == {("disk",): 1.5}
    assert found["droidspeak_lookup_seconds_sum"] == {(): pytest.approx(0.003)}
    assert found["droidspeak_lookup_seconds_bucket"][("0.0025",)] == 0
    assert found["droidspeak_lookup_seconds_bucket"][("0.005",)] == 1
    assert found["vllm:droidspeak_events_total"] == {
        ("reasons", "cross_model_hit"): 2,
        ("requests", "applied"): 2,
        ("shared_tokens", ""): 96,
        ("lookup_failures", ""): 1,
    }
    known = {name for row in METRICS for name in row.series}
    assert {name for name in found if name.startswith("droidspeak")} <= known


def test_buckets_stay_exact_where_steps_are_added_up():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats

    metrics, counters = exporter(), Counters()
    seconds = (0.0002, 0.003, 0.004, 0.3, 100.0)
    for duration in seconds:
        counters.observe("ttft_predicted", duration)
    stats = ConnectorStats.since_last(counters)
    assert stats is not None
    metrics.observe(stats.aggregate(ConnectorStats(data={})).data)
    buckets = {
        bound: count for (bound,), count in samples()["droidspeak_ttft_predicted_seconds_bucket"].items()
    }
    for bound, count in buckets.items():
        assert count == sum(duration <= float(bound) for duration in seconds)


def test_a_second_engine_of_one_process():
    exporter()
    exporter().observe({"reasons|miss": 1})
    assert samples()["droidspeak_requests_total"] == {("miss", "fallback_reprefill"): 1}


def test_what_vllm_logs_are_the_events_alone():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats

    stats = ConnectorStats.since_last(counted())
    assert stats is not None
    assert "reasons cross_model_hit" in stats.reduce()
    assert not [name for name in stats.reduce() if name.startswith(("lookup_bucket", "load_", "hit_tokens"))]


def test_vllm_logs_no_line_for_a_sample(process):
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    from droidspeak.integrations.vllm_connector import DroidSpeakConnector

    log, lines = KVConnectorLogging(None), []
    log.connector_cls = DroidSpeakConnector
    log.observe(process().samples().take().data)
    log.log(lambda *line: lines.append(line))
    log.observe({"reasons|miss": 1})
    log.observe(process().samples("worker 0").take().data)
    log.log(lambda *line: lines.append(line))
    assert lines == [("KV Transfer metrics: %s", "reasons miss=1")]


# --- tiers and queues ---

SIZE, CHUNKS = 64, 3
SOURCE = SourceManifest("model", Architecture("llama", 1, 1, 8, 8, 256, "rope", "full", "float32"), "ids:256")
THREAD = "droidspeak-sample"


@dataclass
class Process:
    """What an engine's process has of ours."""

    connector: Connector
    store: TieredStore

    def save(self, number: int) -> None:
        """A prompt, different ones for different numbers, into all tiers."""
        ids = [number, *range(SIZE * CHUNKS)]
        session = self.connector.save(ids, SOURCE)
        session.put(0, torch.ones(len(ids), 1, 8), torch.ones(len(ids), 1, 8))
        assert session.finish(wait=True) == CHUNKS
        assert self.store.flush()

    def samples(self, who: str = "", waiting: int = 0):
        """Of a worker, or of the scheduler."""
        from droidspeak.integrations.vllm_connector.sampling import EngineSamples

        return EngineSamples(self.store, who, lambda: TierQueue(waiting, 1000))

    def step_stats(self, take):
        from droidspeak.integrations.vllm_connector.sampling import Sampler, StepStats

        return StepStats(self.connector, Sampler(take, pause=0.01))


@pytest.fixture
def process(tmp_path) -> Iterator[Callable[..., Process]]:
    """Opens stores, each with memory of its own, over one folder or over tiers that are given."""
    opened: list[Process] = []

    def opening(*tiers: Tier, **options) -> Process:
        store = TieredStore(tiers or [MemoryTier(1 << 20), DiskTier(tmp_path, min_free=0)], **options)
        connector = Connector(store, PolicySet([]), ConnectorOptions(chunk_size=SIZE))
        opened.append(Process(connector, store))
        return opened[-1]

    yield opening
    for one in opened:
        one.connector.close()
        one.store.close()


def over_the_wire(stats):
    """As the API server gets it from the engine's process."""
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    message = MsgpackEncoder().encode(SchedulerStats(kv_connector_stats=stats.to_dict()))
    return MsgpackDecoder(SchedulerStats).decode(message).kv_connector_stats


def test_an_engine_of_one_process(process, tmp_path):
    """Scheduler and worker share a store."""
    metrics, one = exporter(), process()
    assert samples()["droidspeak_build_info"] == {(__version__,): 1}
    one.save(1)
    metrics.observe(over_the_wire(one.samples("worker 0").take().aggregate(one.samples().take())))
    found = samples()
    assert found["droidspeak_tier_up"] == {("", "cpu"): 1, ("", "disk"): 1}
    assert found["droidspeak_tier_chunks"] == {("", "cpu"): CHUNKS, ("", "disk"): CHUNKS}
    assert found["droidspeak_tier_bytes"][("", "disk")] == one.store.by_tier()["disk"].nbytes > 0
    assert found["droidspeak_tier_capacity_bytes"] == {("", "cpu"): 1 << 20}
    assert found["droidspeak_tier_skipped"][("reading", "", "disk")] == 0
    assert found["droidspeak_write_queue_capacity_bytes"] == {("", "disk"): 1 << 30}
    assert found["droidspeak_promote_queue_bytes"] == {("",): 0}
    assert "droidspeak_store_events_total" not in found
    assert one.store.evict_from("cpu", 1 << 20) > 0
    broken, *_ = one.store.keys()
    file = DiskTier(tmp_path, min_free=0).path(broken)
    file.write_bytes(file.read_bytes()[:-10] + bytes(10))
    with pytest.raises(ChunkCorrupt):
        one.store.read(broken)
    metrics.observe(over_the_wire(one.samples("worker 0").take().aggregate(one.samples().take())))
    found = samples()
    assert found["droidspeak_store_events_total"] == {("corrupt", "", "disk"): 1}
    assert found["droidspeak_tier_evicted_chunks_total"] == {("", "cpu"): CHUNKS, ("", "disk"): 0}
    assert found["droidspeak_tier_chunks"] == {("", "cpu"): 0, ("", "disk"): CHUNKS - 1}
    known = {name for row in METRICS for name in row.series}
    assert {name for name in found if name.startswith("droidspeak")} <= known


def test_queues_and_memory_of_workers_add_up_and_tiers_do_not(process):
    metrics, scheduler, workers = exporter(), process(), [process(), process()]
    for number, worker in enumerate(workers):
        worker.save(number)
        worker.store.counters.add("hits", "disk", 2)
    first, second = (worker.samples(f"worker {n}", waiting=100 + n) for n, worker in enumerate(workers))
    leading = scheduler.samples()
    for _ in range(2):  # what has been told before does not count again
        metrics.observe(over_the_wire(first.take().aggregate(second.take()).aggregate(leading.take())))
        found = samples()
        assert found["droidspeak_save_queue_bytes"] == {(): 201}
        assert found["droidspeak_save_queue_capacity_bytes"] == {(): 2000}
        assert found["droidspeak_write_queue_capacity_bytes"] == {("", "disk"): 2 << 30}
        assert found["droidspeak_tier_chunks"] == {("", "cpu"): 2 * CHUNKS, ("", "disk"): 2 * CHUNKS}
        assert found["droidspeak_tier_capacity_bytes"] == {("", "cpu"): 2 << 20}
        assert found["droidspeak_tier_up"] == {("", "cpu"): 1, ("", "disk"): 1}
        assert found["droidspeak_store_events_total"] == {("hits", "", "disk"): 4}
    # A step that only one worker has a new sample for.
    metrics.observe(over_the_wire(workers[0].samples("worker 0", waiting=7).take()))
    assert samples()["droidspeak_save_queue_bytes"] == {(): 108}


def test_an_api_server_that_is_told_every_other_step_knows_all(process):
    """vLLM tells each step to one of them."""
    from vllm.v1.outputs import KVConnectorOutput

    one = process()
    by_workers = [one.samples(f"worker {n}", waiting=100 + n).take() for n in range(2)]
    with_a_sample = one.step_stats(one.samples().take)
    for stats in by_workers:
        output = KVConnectorOutput(kv_connector_stats=stats)
        with_a_sample.hear(output.kv_connector_stats)
    with_a_sample.hear(None)
    metrics = exporter()
    told = with_a_sample.next()
    with_a_sample.close()
    assert told is not None
    metrics.observe(over_the_wire(told))
    assert samples()["droidspeak_save_queue_bytes"] == {(): 201}


# --- beside the engine's steps ---


class Hanging(DiskTier):
    """A disk that does not say what it holds before it may."""

    def __init__(self, folder) -> None:
        super().__init__(folder, min_free=0)
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def usage(self) -> TierUsage:
        self.asked.set()
        assert self.may_answer.wait(60)
        return super().usage()


def samplers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def next_with(stats, name: str) -> dict[str, float]:
    """What steps tell, up to the one that tells `name`."""
    told: dict[str, float] = {}

    def there() -> bool:
        step = stats.next()
        told.update(step.data if step is not None else {})
        return any(name in key for key in told)

    wait_for(there, name)
    return told


def test_a_step_does_not_wait_for_a_tier(process, tmp_path):
    tier = Hanging(tmp_path)
    one = process(tier)
    stats = one.step_stats(one.samples().take)
    assert not samplers()
    assert stats.next() is None
    assert tier.asked.wait(60)
    assert stats.next() is None  # and comes back
    one.connector.counters.add("reasons", "miss")
    counted = stats.next()
    assert counted is not None
    assert counted.data == {"reasons|miss": 1}
    tier.may_answer.set()
    next_with(stats, "tier_chunks")
    stats.close()
    assert not samplers()


def test_nothing_is_sampled_while_the_engine_idles(process):
    one, taken = process(), []
    samples = one.samples()

    def take():
        taken.append(samples.take())
        return taken[-1]

    stats = one.step_stats(take)
    stats.next()
    wait_for(lambda: len(taken) == 1, "a sample")
    time.sleep(0.2)  # many pauses
    assert len(taken) == 1
    stats.close()


def test_samples_that_no_step_has_come_for_are_put_together():
    from droidspeak.integrations.vllm_connector.metrics import ConnectorStats, gauge_key, increase_key
    from droidspeak.integrations.vllm_connector.sampling import Sampler

    misses, waiting = increase_key("store_events", ("", "", "misses")), gauge_key("waiting", "worker 0", ())
    found = [ConnectorStats(data={misses: 2, waiting: 30}), ConnectorStats(data={misses: 1, waiting: 5})]
    asked, may_answer = threading.Semaphore(0), threading.Semaphore(0)

    def take() -> ConnectorStats:
        asked.release()
        assert may_answer.acquire(timeout=60)
        return found.pop(0)

    sampler = Sampler(take, pause=0.0)
    assert sampler.latest() is None
    assert asked.acquire(timeout=60)
    assert sampler.latest() is None  # a step while the first one is taken, which wants the second
    may_answer.release()
    assert asked.acquire(timeout=60)
    may_answer.release()
    sampler.close()
    together = sampler.latest()
    assert together is not None
    assert together.data == {misses: 3, waiting: 5}


def test_a_tier_that_is_down(process):
    one = process(
        open_tier(f"droidspeak://127.0.0.1:{free_port()}"), limits={"remote": Limits(cooldown=60.0)}
    )
    metrics, stats = exporter(), one.step_stats(one.samples().take)
    metrics.observe(next_with(stats, "tier_skipped"))
    stats.close()
    found = samples()
    assert found["droidspeak_tier_up"] == {("", "remote"): 0}
    assert found["droidspeak_tier_skipped"][("reading", "", "remote")] == 1
    assert not found.get("droidspeak_tier_chunks")


def test_a_tier_of_the_users_that_raises_anything(process, tmp_path, caplog):
    class Raising(DiskTier):
        rounds = 0

        def usage(self) -> TierUsage:
            self.rounds += 1
            if self.rounds == 1:
                raise ZeroDivisionError
            return super().usage()

    one = process(Raising(tmp_path, min_free=0))
    stats = one.step_stats(one.samples().take)
    next_with(stats, "tier_chunks")
    stats.close()
    assert "ZeroDivisionError" in caplog.text
    assert not samplers()
