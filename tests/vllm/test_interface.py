"""What we take for granted of vLLM. When one of these fails, vLLM has changed, and the door with it."""

from __future__ import annotations

import importlib
import inspect

import pytest

# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")

CONNECTOR = "droidspeak.integrations.vllm_connector:DroidSpeakConnector"
_OURS, _THEIRS = "droidspeak.integrations.vllm_connector", "vllm.distributed.kv_transfer.kv_connector.v1"
BASES = {
    CONNECTOR: (f"{_THEIRS}.base:KVConnectorBase_V1", f"{_THEIRS}.base:SupportsHMA"),
    f"{_OURS}.messages:StepOrders": (f"{_THEIRS}.base:KVConnectorMetadata",),
    f"{_OURS}.messages:Reports": (f"{_THEIRS}.base:KVConnectorWorkerMetadata",),
    f"{_OURS}.metrics:ConnectorStats": (f"{_THEIRS}.metrics:KVConnectorStats",),
    f"{_OURS}.metrics:ConnectorMetrics": (f"{_THEIRS}.metrics:KVConnectorPromMetrics",),
}
OWN = {"loads", "saves", "since_last", "data"}  # names of ours that vLLM does not ask for
# What vLLM calls, beyond what is abstract: a hook of another name would silently never be called.
HOOKS = {
    "bind_kv_cache_manager",
    "build_connector_meta",
    "build_connector_worker_meta",
    "build_kv_connector_stats",
    "build_prom_metrics",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "get_num_new_matched_tokens",
    "get_transfer_results",
    "register_kv_caches",
    "request_finished_all_groups",
    "requires_kv_delivery",
    "requires_piecewise_for_cudagraph",
    "save_kv_layer",
    "shutdown",
    "start_load_kv",
    "update_connector_output",
    "update_state_after_alloc",
    "wait_for_layer_load",
    "wait_for_save",
}


def named(place: str):
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_every_hook_is_one_of_vllms():
    assert public(named(CONNECTOR)) == HOOKS


@pytest.mark.parametrize("place", BASES)
def test_parameters_are_those_of_vllm(place):
    ours, bases = named(place), [named(base) for base in BASES[place]]
    assert all(issubclass(ours, base) for base in bases)
    theirs = {name: base for base in reversed(bases) for name in dir(base)}
    names = public(ours) - OWN
    assert names <= theirs.keys()
    for name in names | ({"__init__"} if place == CONNECTOR else set()):
        mine, original = inspect.getattr_static(ours, name), inspect.getattr_static(theirs[name], name)
        assert isinstance(mine, property) == isinstance(original, property), name
        if not isinstance(mine, property):
            mine, original = (getattr(method, "__func__", method) for method in (mine, original))
            parameters = [list(inspect.signature(method).parameters) for method in (mine, original)]
            assert parameters[0] == parameters[1], name


USED = {
    "vllm.v1.request:Request": (
        "block_hashes",
        "cache_salt",
        "kv_transfer_params",
        "lora_request",
        "mm_features",
        "prompt_embeds",
        "prompt_token_ids",
        "request_id",
        "update_block_hashes",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ("evict_blocks", "get_block_ids"),
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": ("get_block_ids",),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "num_scheduled_tokens",
        "scheduled_cached_reqs",
        "scheduled_new_reqs",
    ),
    "vllm.v1.core.sched.output:NewRequestData": ("num_computed_tokens", "req_id"),
    "vllm.v1.core.sched.output:CachedRequestData": ("num_computed_tokens", "req_ids"),
    "vllm.v1.outputs:KVConnectorOutput": (
        "failed_recving",
        "invalid_block_ids",
        "kv_connector_stats",
        "kv_connector_worker_meta",
    ),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups",),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("kv_cache_spec", "layer_names"),
    "vllm.v1.kv_cache_interface:KVCacheSpec": ("block_size",),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": ("sliding_window",),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "block_table_tensor",
        "causal",
        "max_query_len",
        "max_seq_len",
        "num_actual_tokens",
        "num_reqs",
        "positions",
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "slot_mapping",
    ),
    "vllm.model_executor.layers.attention:Attention": ("get_attn_backend", "get_kv_cache_spec"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": ("do_kv_cache_update",),
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader": ("load_model",),
    "vllm.model_executor.models.utils:extract_layer_index": (),
    "vllm.forward_context:set_forward_context": (),
    "vllm.lora.request:LoRARequest": ("lora_int_id", "lora_name", "lora_path"),
    "vllm.lora.layers:LoRAMapping": ("index_mapping", "is_prefill", "prompt_mapping"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager": ("_last_mapping", "set_adapter_mapping"),
}


@pytest.mark.parametrize("place", USED)
def test_names_that_we_use(place):
    found = named(place)
    known = {*dir(found), *getattr(found, "__annotations__", {}), *_set_in_init(found)}
    assert set(USED[place]) <= known, f"{place} is another one now"


def _set_in_init(found: object) -> set[str]:
    """Attributes that the class, or one that it is made from, assigns when it is made."""
    if not inspect.isclass(found):
        return set()
    names: set[str] = set()
    for cls in found.__mro__:
        if inspect.isfunction(init := vars(cls).get("__init__")):
            names |= set(init.__code__.co_names)
    return names


def test_loads_are_asked_for_before_the_forward_only_if_they_are_of_this_step():
    """`start_load_kv` comes before the forward if a request loads within the step, and after it otherwise."""
    mixin = importlib.import_module("vllm.v1.worker.kv_connector_model_runner_mixin")
    source = inspect.getsource(mixin.KVConnectorModelRunnerMixin._get_kv_connector_output)
    before, _, after = source.partition("yield")
    assert "start_load_kv" in before
    assert "has_sync_kv_loads" in before
    assert "start_load_kv" in after
    assert before.index("bind_connector_metadata") < before.index("start_load_kv")
    assert "wait_for_save" in after
