"""Identity: whose cache is this, and may somebody else use it?

A `SourceManifest` describes one model as far as its KV cache depends on it. Its canonical JSON,
hashed, is the `SourceId` under which chunks are stored. What cannot be identified is an error, never
a wildcard, and nothing is taken from a path or a name: a folder can be overwritten, a revision moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from droidspeak.errors import Incompatible, UnknownIdentity
from droidspeak.storage.digests import cache_folder, canonical, read_json, tokenizer_digest, weights_digest
from droidspeak.storage.keys import SourceId

__all__ = [
    "KV_LAYOUT",
    "Architecture",
    "Mismatch",
    "SourceManifest",
    "cache_folder",
    "require_compatible",
    "tokenizer_digest",
    "weights_digest",
]

KV_LAYOUT = "token-major-1"
"""Layout of stored tensors: `[tokens, kv_heads, head_dim]`, keys after RoPE."""


class Mismatch(StrEnum):
    """Why two models may not share; the values are reasons of the status `unsupported`."""

    UNKNOWN_WEIGHTS = "unknown_weights"
    ARCHITECTURE = "other_architecture"
    ROPE = "other_rope"
    DTYPE = "other_dtype"
    TOKENIZER = "other_tokenizer"
    LAYOUT = "other_layout"


@dataclass(frozen=True)
class Architecture:
    """What decides the shape and meaning of a KV cache, weights apart.

    Attributes:
        rope: canonical JSON of the rotary embedding's parameters.
        attention: canonical JSON of what bounds attention (sliding window, kinds of layers).
        dtype: of the cache, e.g. `"bfloat16"`.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    rope: str
    attention: str
    dtype: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: str | None = None) -> Architecture:
        """From the content of a `config.json`.

        Args:
            dtype: the dtype the model really runs in, if it differs from the config's.

        Raises:
            UnknownIdentity: an entry is missing or is not what it should be.
        """
        try:
            text = {**config, **(config.get("text_config") or {})}
            heads = int(text["num_attention_heads"])
            hidden = int(text["hidden_size"])
            return cls(
                model_type=str(text["model_type"]),
                layers=int(text["num_hidden_layers"]),
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or hidden // heads),
                hidden_size=hidden,
                vocab_size=int(text["vocab_size"]),
                rope=canonical(_rope(text)),
                attention=canonical(_attention(text)),
                dtype=_dtype_name(dtype or text.get("dtype") or text.get("torch_dtype")),
            )
        except UnknownIdentity:
            raise
        except KeyError as error:
            raise UnknownIdentity(
                f"model configuration has no {error}: its architecture is unknown"
            ) from None
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UnknownIdentity(f"model configuration cannot be understood: {error}") from None


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """One form for `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (4).

    As `RotaryEmbeddingConfigMixin` of transformers 5 does it; defaults that change nothing are left out.
    """
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _plain_rope(value or {}, text) for kind, value in rope.items()}
    return _plain_rope(rope, text)


def _plain_rope(given: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    rope = {key: float(value) if type(value) is int else value for key, value in given.items()}
    legacy_kind = rope.pop("type", None)
    rope.setdefault("rope_type", legacy_kind or "default")
    rope.setdefault("rope_theta", float(text.get("rope_theta") or 10000))
    rope.setdefault("partial_rotary_factor", float(text.get("partial_rotary_factor") or 1))
    if rope["partial_rotary_factor"] == 1:
        del rope["partial_rotary_factor"]
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        trained = text.get("original_max_position_embeddings")
        trained = trained or rope.get("original_max_position_embeddings") or text["max_position_embeddings"]
        rope["original_max_position_embeddings"] = float(trained)
    return rope


def _attention(text: Mapping[str, Any]) -> dict[str, Any]:
    """The window and the layers that it bounds; neither where all attention is full."""
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    kinds = text.get("layer_types")
    if set(kinds or ()) == {"full_attention"}:
        window = kinds = None
    return {"layer_types": kinds, "sliding_window": window}


def _dtype_name(dtype: Any) -> str:
    if dtype in (None, "auto"):
        raise UnknownIdentity("model configuration names no dtype: the cache's dtype is unknown")
    import torch

    known = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(known, torch.dtype):
        raise UnknownIdentity(f"model configuration names the dtype {dtype!r}, which is unknown")
    return str(known).removeprefix("torch.")


@dataclass(frozen=True)
class SourceManifest:
    """Everything that a KV cache depends on.

    Attributes:
        weights: digest of the base weights.
        tokenizer: digest of the tokenizer, or `"ids:<vocab size>"` where prompts are token ids.
        adapter: digest of the active LoRA adapter, `None` without one.
    """

    weights: str
    architecture: Architecture
    tokenizer: str
    adapter: str | None = None
    layout: str = KV_LAYOUT

    def __post_init__(self) -> None:
        if not self.weights:
            raise UnknownIdentity("the weights have no digest: their cache can never be shared")

    @cached_property
    def source_id(self) -> SourceId:
        return SourceId(hashlib.sha256(canonical(dataclasses.asdict(self)).encode()).hexdigest())

    @classmethod
    def from_folder(
        cls, folder: Path | str, *, adapter: Path | str | None = None, dtype: str | None = None
    ) -> SourceManifest:
        """Of a transformers model folder, and of a PEFT adapter folder on top of it.

        An adapter counts by its file here, for engines that load it by path. The transformers door
        counts the adapter's tensors in memory, which is another id: ask the door for its manifest.

        Raises:
            UnknownIdentity: no `config.json`, no safetensors weights, or no dtype.
        """
        folder = Path(folder)
        architecture = Architecture.from_config(read_json(folder / "config.json"), dtype)
        return cls(
            weights=weights_digest(folder),
            architecture=architecture,
            tokenizer=tokenizer_digest(folder, architecture.vocab_size),
            adapter=None if adapter is None else weights_digest(Path(adapter), stem="adapter_model"),
        )


def require_compatible(sender: SourceManifest, receiver: SourceManifest) -> None:
    """Passes if a cache of `sender` means something to `receiver`.

    Raises:
        Incompatible: with the first `Mismatch` found and both values in the message.
    """
    mine, theirs = receiver.architecture, sender.architecture
    checks = (
        (Mismatch.LAYOUT, sender.layout, receiver.layout),
        (Mismatch.ROPE, theirs.rope, mine.rope),
        (Mismatch.DTYPE, theirs.dtype, mine.dtype),
        (Mismatch.ARCHITECTURE, _shape(theirs), _shape(mine)),
        (Mismatch.TOKENIZER, sender.tokenizer, receiver.tokenizer),
    )
    for reason, sent, received in checks:
        if sent != received:
            raise Incompatible(reason, f"{reason}: sender has {sent}, receiver has {received}")


def _shape(architecture: Architecture) -> str:
    fields = dataclasses.asdict(architecture)
    return canonical({key: value for key, value in fields.items() if key not in ("rope", "dtype")})
