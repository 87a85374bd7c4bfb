"""Tiny random models of every architecture that the transformers door serves, on CPU in float32.

Weights are large enough that greedy tokens are not decided by rounding, and windows are shorter than the
prompts of the tests, so that sliding attention matters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

VOCAB = 128
HIDDEN = 32
WINDOW = 8
SLIDING, FULL = "sliding_attention", "full_attention"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GEMMA = {"num_hidden_layers": 5, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

_CONFIGS: dict[str, partial[PreTrainedConfig]] = {
    "llama": partial(LlamaConfig),
    "mistral": partial(MistralConfig, sliding_window=WINDOW),
    "qwen2": partial(Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": partial(Qwen3Config, head_dim=16),
    "phi3": partial(Phi3Config),
    "gemma2": partial(Gemma2Config, **_GEMMA, layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING]),
    "gemma3": partial(Gemma3TextConfig, **_GEMMA, layer_types=[SLIDING, SLIDING, FULL, SLIDING, FULL]),
    "mixtral": partial(MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": partial(Qwen2MoeConfig, **_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3_moe": partial(Qwen3MoeConfig, **_EXPERTS, head_dim=16),
}

ARCHITECTURES = tuple(_CONFIGS)
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3")


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of the tiny model of `architecture`, with `changes`."""
    build = _CONFIGS[architecture]
    return build.func(**{**_SHAPE, **build.keywords, **changes})


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of `architecture` in eval mode; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).eval()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """`[count]` random token ids, none of them the padding token."""
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
