"""The flags that make a vLLM server a sender, a receiver, or both. Nothing of vLLM is imported here.

--kv-transfer-config    our connector, its role and its options
--speculative-config    senders only: capture of E at the layers that policies start a recompute group from
--dtype                 of the model's files; vLLM serves float32 files in another dtype by itself, and
                        then nothing of theirs fits the policies
--middleware            what became of a request, in the head of its response
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from droidspeak.config import open_policies
from droidspeak.config.opening import settings_from
from droidspeak.storage import SourceManifest

__all__ = ["EngineArguments", "Role", "engine_arguments"]

CONNECTOR = "DroidSpeakConnector"
MODULE = "droidspeak.integrations.vllm_connector"
MIDDLEWARE = f"{MODULE}.headers.OutcomeHeader"


class Role(StrEnum):
    """What a server does: `sender` saves what it prefills, `receiver` loads, `both` does both."""

    SENDER = "sender"
    RECEIVER = "receiver"
    BOTH = "both"

    @property
    def kv_role(self) -> str:
        """vLLM's name of it."""
        return {"sender": "kv_producer", "receiver": "kv_consumer", "both": "kv_both"}[self.value]

    @property
    def sends(self) -> bool:
        return self is not Role.RECEIVER

    @property
    def receives(self) -> bool:
        return self is not Role.SENDER


@dataclass(frozen=True)
class EngineArguments:
    """For `python -m vllm.entrypoints.openai.api_server` or `vllm serve`.

    Attributes:
        role: the server's.
        extra: `kv_connector_extra_config`, keys of `droidspeak.config.Settings`.
        e_layers: whose input the server captures, ascending.
        dtype: of the model, `None` if that was not asked for.
        senders: how many models' caches policies let it use.
    """

    role: Role
    extra: Mapping[str, Any]
    e_layers: tuple[int, ...] = ()
    dtype: str | None = None
    senders: int = 0

    @property
    def kv_transfer_config(self) -> dict[str, Any]:
        """vLLM's `KVTransferConfig`. A load that fails is prefilled; vLLM's default ends the request."""
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": self.role.kv_role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": dict(self.extra),
        }

    @property
    def speculative_config(self) -> dict[str, Any] | None:
        """vLLM's `SpeculativeConfig`, `None` if nothing is captured. Nothing is speculated."""
        if not self.e_layers:
            return None
        layers = {"eagle_aux_hidden_state_layer_ids": list(self.e_layers)}
        return {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": layers},
        }

    @property
    def flags(self) -> list[str]:
        """Not quoted for any shell."""
        flags = ["--kv-transfer-config", _compact(self.kv_transfer_config)]
        if (speculative := self.speculative_config) is not None:
            flags += ["--speculative-config", _compact(speculative)]
        if self.dtype is not None:
            flags += ["--dtype", self.dtype]
        return [*flags, "--middleware", MIDDLEWARE]


def engine_arguments(
    role: Role, extra: Mapping[str, Any], model: SourceManifest | None = None
) -> EngineArguments:
    """The arguments of a server that serves `model`.

    Args:
        extra: options of the connector, checked here (tiers are opened by the server only): keys of
            `droidspeak.config.Settings`, and `config` for a file of them.
        model: without it, which E to capture and the dtype are left to the caller.

    Raises:
        ConfigError, PolicyError: as the connector would, when vLLM starts.
    """
    policies = open_policies(settings_from(extra))
    if model is None:
        return EngineArguments(role, extra)
    needed = policies.transition_layers(model.source_id) if role.sends else ()
    followed = policies.for_receiver(model.source_id) if role.receives else ()
    dtype = model.architecture.dtype
    return EngineArguments(role, extra, tuple(sorted(needed)), dtype, len(followed))


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
