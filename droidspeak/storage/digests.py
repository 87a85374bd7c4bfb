"""Digests of model folders: of their weights, and of what makes their tokenizer.

Hashing the shards of a large model takes minutes, so digests of files are remembered in the user's
cache folder for as long as a file is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from droidspeak.errors import ConfigError, UnknownIdentity

__all__ = ["cache_folder", "canonical", "digest_file", "read_json", "tokenizer_digest", "weights_digest"]

_OLDER_TOKENIZER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


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
    table = read_json(index).get("weight_map")
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


def _tokenizer_rules(file: BufferedReader) -> str:
    """SHA-256 of a `tokenizer.json` without layout, padding and truncation: trainers leave theirs in it."""
    try:
        content = dict(json.load(file))
    except (TypeError, ValueError):
        raise UnknownIdentity(f"{file.name} is no tokenizer") from None
    return _digest_of({key: content[key] for key in content if key not in ("padding", "truncation")})


def _digest_of(parts: Any) -> str:
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def _whole_file(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path, how: Callable[[BufferedReader], str] = _whole_file) -> str:
    """Digest of a file, remembered for as long as the file is the same and has not been touched.

    Args:
        how: what to digest; SHA-256 of all bytes by default. Remembered by its name: another digest
            needs another one.

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
    memory.put(state, digest)
    return digest


def _state(file: BufferedReader) -> list[int]:
    """Differs whenever the content may: two models of one architecture have files of one size, and a
    renamed or unpacked file may bring any modification time with it."""
    status = os.fstat(file.fileno())
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class _DigestMemory:
    """Remembers the digest of one path, in a file of its own in the cache folder.

    It only saves time: unreadable or unwritable is the same as empty.
    """

    def __init__(self, path: Path, how: str) -> None:
        self._name = hashlib.sha256(f"{path.resolve()}\n{how}".encode()).hexdigest()[:32]

    def get(self, state: list[int]) -> str | None:
        try:
            content = json.loads(self._file().read_text())
        except (OSError, ValueError):
            return None
        known = content.get("digest") if isinstance(content, dict) and content.get("state") == state else None
        return known if isinstance(known, str) else None

    def put(self, state: list[int], digest: str) -> None:
        with suppress(OSError, ConfigError):
            self._file().parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._file().parent) as folder:
                new = Path(folder, "new")
                new.write_text(json.dumps({"state": state, "digest": digest}))
                new.replace(self._file())

    def _file(self) -> Path:
        return cache_folder() / "digests" / f"{self._name}.json"


def cache_folder() -> Path:
    """The user's cache folder for DroidSpeak (`XDG_CACHE_HOME`, else `~/.cache`).

    Raises:
        ConfigError: there is no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "droidspeak"
    except RuntimeError:
        raise ConfigError("this user has no home folder; set XDG_CACHE_HOME") from None


def canonical(value: Any) -> str:
    """One JSON text for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises `UnknownIdentity`."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UnknownIdentity(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UnknownIdentity(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise UnknownIdentity(f"{path} is not a JSON object")
    return content
