"""Identity: whose cache is this, and may somebody else use it?

A `SourceManifest` describes one model as far as its KV cache depends on it. Its canonical JSON,
hashed, is the `SourceId` under which chunks are stored. What cannot be identified is an error, never
a wildcard, and nothing is taken from a path or a name: a folder can be overwritten, a revision moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

import torch

from droidspeak.errors import Incompatible, UnknownIdentity
from droidspeak.storage.keys import SourceId

__all__ = [
    "KV_LAYOUT",
    "Architecture",
    "Mismatch",
    "SourceManifest",
    "cache_folder",
    "digest_file",
    "require_compatible",
    "tokenizer_digest",
    "weights_digest",
]

KV_LAYOUT = "token-major-1"
"""Layout of stored tensors: `[tokens, kv_heads, head_dim]`, keys after RoPE."""

_OLDER_TOKENIZER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


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
            UnknownIdentity: a needed entry is missing.
        """
        text = {**config, **(config.get("text_config") or {})}
        try:
            heads = int(text["num_attention_heads"])
            hidden = int(text["hidden_size"])
            return cls(
                model_type=str(text["model_type"]),
                layers=int(text["num_hidden_layers"]),
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or hidden // heads),
                hidden_size=hidden,
                vocab_size=int(text["vocab_size"]),
                rope=_canonical(_rope(text)),
                attention=_canonical(_attention(text)),
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
    known = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(known, torch.dtype):
        raise UnknownIdentity(f"model configuration names the dtype {dtype!r}, which is unknown")
    return str(known).removeprefix("torch.")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


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

    @property
    def source_id(self) -> SourceId:
        return SourceId(hashlib.sha256(_canonical(dataclasses.asdict(self)).encode()).hexdigest())

    @classmethod
    def from_folder(
        cls, folder: Path | str, *, adapter: Path | str | None = None, dtype: str | None = None
    ) -> SourceManifest:
        """Of a transformers model folder, and of a PEFT adapter folder on top of it.

        Raises:
            UnknownIdentity: no `config.json`, no safetensors weights, or no dtype.
        """
        folder = Path(folder)
        architecture = Architecture.from_config(_read_json(folder / "config.json"), dtype)
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
    return _canonical({key: value for key, value in fields.items() if key not in ("rope", "dtype")})


def weights_digest(folder: Path, stem: str = "model") -> str:
    """SHA-256 over the safetensors shards of `folder` and their names.

    A folder with both one file and an index of shards has all of them counted: which ones are loaded is
    up to the engine. Adapter folders (`stem="adapter_model"`) include `adapter_config.json`: rank and
    scale matter.

    Raises:
        UnknownIdentity: no safetensors weights, or a shard that cannot be read.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    names = _shards(index) if index.is_file() else []
    if single.is_file() or not names:
        names.append(single.name)
    if stem == "adapter_model":
        names.append("adapter_config.json")
    return _digest_of([(name, digest_file(folder / name)) for name in names])


def _shards(index: Path) -> list[str]:
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UnknownIdentity(f"{index} has no weight_map")
    return sorted(set(table.values()))


def tokenizer_digest(folder: Path, vocab_size: int) -> str:
    """SHA-256 over the tokenizer's files; `"ids:<vocab size>"` for a folder that has none.

    Only what decides token ids counts: chat templates and settings of padding and truncation do not.
    """
    if (folder / "tokenizer.json").is_file():
        return digest_file(folder / "tokenizer.json", _tokenizer_rules)
    # What older formats need instead of tokenizer.json.
    present = [name for name in _OLDER_TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return f"ids:{vocab_size}"
    return _digest_of([(name, digest_file(folder / name)) for name in present])


def _tokenizer_rules(file: BinaryIO) -> str:
    """SHA-256 of a `tokenizer.json` without layout, padding and truncation: trainers leave theirs in it."""
    content = json.load(file)
    return _digest_of({key: content[key] for key in content if key not in ("padding", "truncation")})


def _digest_of(parts: Any) -> str:
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


def _whole_file(file: BinaryIO) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path, how: Callable[[BinaryIO], str] = _whole_file) -> str:
    """Digest of a file, remembered for as long as the file is the same and has not been touched.

    Args:
        how: what to digest; SHA-256 of all bytes by default.

    Raises:
        UnknownIdentity: the file cannot be read, or has changed while it was read.
    """
    try:
        with path.open("rb") as file:
            state = _state(file)
            memory = _DigestMemory(path, how.__name__)
            if (known := memory.get(state)) is not None:
                return known
            digest = how(file)
            if _state(file) != state:
                raise UnknownIdentity(f"{path} cannot be identified: it is being changed")
    except OSError as error:
        raise UnknownIdentity(f"{path} cannot be identified: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, UnknownIdentity):
            raise
        raise UnknownIdentity(f"{path} cannot be identified: {error}") from None
    memory.put(state, digest)
    return digest


def _state(file: BinaryIO) -> list[int]:
    """Differs whenever the content may: two models of one architecture have files of one size, and a
    renamed or unpacked file may bring any modification time with it."""
    status = os.fstat(file.fileno())
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class _DigestMemory:
    """Remembers the digest of one path, in a file of its own in the cache folder.

    It only saves time: unreadable or unwritable is the same as empty.
    """

    def __init__(self, path: Path, how: str) -> None:
        name = hashlib.sha256(f"{path.resolve()}\n{how}".encode()).hexdigest()
        self._file = cache_folder() / "digests" / f"{name[:32]}.json"

    def get(self, state: list[int]) -> str | None:
        try:
            content = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        known = content.get("digest") if isinstance(content, dict) and content.get("state") == state else None
        return known if isinstance(known, str) else None

    def put(self, state: list[int], digest: str) -> None:
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._file.parent) as folder:
                new = Path(folder, "new")
                new.write_text(json.dumps({"state": state, "digest": digest}))
                new.replace(self._file)


def cache_folder() -> Path:
    """The user's cache folder for DroidSpeak (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "droidspeak"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UnknownIdentity(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UnknownIdentity(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise UnknownIdentity(f"{path} is not a JSON object")
    return content
