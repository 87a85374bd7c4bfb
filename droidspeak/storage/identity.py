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
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

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

_TOKENIZER_FILES = (
    "tokenizer.json",
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
                attention=_canonical({key: text.get(key) for key in ("layer_types", "sliding_window")}),
                dtype=_dtype_name(dtype or text.get("dtype") or text.get("torch_dtype")),
            )
        except KeyError as error:
            raise UnknownIdentity(
                f"model configuration has no {error}: its architecture is unknown"
            ) from None


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """One form for `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (4)."""
    rope = dict(text.get("rope_parameters") or {})
    if not rope:
        rope = {"rope_theta": text.get("rope_theta", 10000.0), **(text.get("rope_scaling") or {})}
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    if not any(isinstance(value, dict) for value in rope.values()):
        rope.setdefault("rope_type", "default")
    return rope


def _dtype_name(dtype: Any) -> str:
    if dtype in (None, "auto"):
        raise UnknownIdentity("model configuration names no dtype: the cache's dtype is unknown")
    return str(dtype).removeprefix("torch.")


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

    Adapter folders (`stem="adapter_model"`) include `adapter_config.json`: rank and scale matter.

    Raises:
        UnknownIdentity: no safetensors weights, or a shard that cannot be read.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        names = [f"{stem}.safetensors"]
    if stem == "adapter_model":
        names.append("adapter_config.json")
    return _digest_of([(name, digest_file(folder / name)) for name in names])


def tokenizer_digest(folder: Path, vocab_size: int) -> str:
    """SHA-256 over the tokenizer's files; `"ids:<vocab size>"` for a folder that has none.

    Only files that decide token ids count: chat templates and settings of the padding do not.
    """
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return f"ids:{vocab_size}"
    # tokenizer.json states everything; the other files are what older formats need instead.
    names = present[:1] if present[0] == "tokenizer.json" else present
    return _digest_of([(name, digest_file(folder / name)) for name in names])


def _digest_of(parts: list[tuple[str, str]]) -> str:
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file, remembered by path, size and modification time (ns).

    Raises:
        UnknownIdentity: the file cannot be read.
    """
    try:
        status = path.stat()
        remembered = _DigestMemory(cache_folder() / "digests.json")
        row = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if (known := remembered.get(row)) is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnknownIdentity(f"{path} cannot be identified: {error.strerror}") from None
    remembered.add(row, digest)
    return digest


class _DigestMemory:
    """Digests in one JSON file. It only saves time: unreadable or unwritable is the same as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, row: str) -> str | None:
        return self._load().get(row)

    def add(self, row: str, digest: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({**self._load(), row: digest}, file)
            os.replace(file.name, self._path)
        except OSError:
            return

    def _load(self) -> dict[str, str]:
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


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
