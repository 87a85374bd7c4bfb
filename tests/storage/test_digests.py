"""Digests of model folders, and the memory that saves reading them twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import pytest

from droidspeak.errors import ConfigError, UnknownIdentity
from droidspeak.storage.digests import cache_folder, digest_file, read_json, tokenizer_digest, weights_digest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def one_line(error: pytest.ExceptionInfo[UnknownIdentity], path: Path) -> bool:
    text = str(error.value)
    return "\n" not in text and str(path) in text


class Reads:
    """A digest that counts how often it is taken."""

    __name__ = "counted"

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, file: BufferedReader) -> str:
        self.count += 1
        return hashlib.sha256(file.read()).hexdigest()


# Weights


def test_weights_are_their_bytes_not_their_place(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    before = weights_digest(folder)
    moved = folder.rename(tmp_path / "moved")
    assert weights_digest(moved) == before
    (moved / "model.safetensors").write_bytes(b"Weights")
    assert weights_digest(moved) != before


def sharded(folder: Path, **shards: bytes) -> None:
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    table = {f"layer.{n}": name for n, name in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_every_shard_counts(folder: Path) -> None:
    sharded(folder, a=b"one", b=b"two")
    before = weights_digest(folder)
    (folder / "unrelated.safetensors").write_bytes(b"not in the index")
    assert weights_digest(folder) == before
    (folder / "b").write_bytes(b"TWO")
    changed = weights_digest(folder)
    assert changed != before
    sharded(folder, a=b"TWO", b=b"one")
    assert weights_digest(folder) not in (before, changed)


def test_two_sets_of_weights_are_both_counted(folder: Path) -> None:
    sharded(folder, a=b"one")
    shards_only = weights_digest(folder)
    (folder / "model.safetensors").write_bytes(b"whole")
    both = weights_digest(folder)
    (folder / "model.safetensors").write_bytes(b"Whole")
    assert len({shards_only, both, weights_digest(folder)}) == 3


def test_an_adapter_is_its_weights_and_its_configuration(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"lora")
    (folder / "adapter_config.json").write_text('{"r": 8}')
    before = weights_digest(folder, "adapter_model")
    (folder / "adapter_config.json").write_text('{"r": 9}')
    assert weights_digest(folder, "adapter_model") != before
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UnknownIdentity, match=r"adapter_config\.json"):
        weights_digest(folder, "adapter_model")


def test_missing_weights_are_unknown(folder: Path) -> None:
    with pytest.raises(UnknownIdentity) as caught:
        weights_digest(folder)
    assert one_line(caught, folder / "model.safetensors")
    sharded(folder, a=b"one")
    (folder / "a").unlink()
    with pytest.raises(UnknownIdentity) as caught:
        weights_digest(folder)
    assert one_line(caught, folder / "a")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', "{", "\xff"])
def test_a_broken_index_is_unknown(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(UnknownIdentity) as caught:
        weights_digest(folder)
    assert one_line(caught, folder / "model.safetensors.index.json")


# Tokenizers


def test_a_tokenizer_is_its_rules(folder: Path) -> None:
    file = folder / "tokenizer.json"
    rules = {"model": {"vocab": {"a": 0}}, "padding": None, "truncation": None}
    file.write_text(json.dumps(rules))
    before = tokenizer_digest(folder, 10)
    file.write_text(json.dumps({**rules, "padding": {"length": 8}, "truncation": {}}, indent=2))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "new"}')
    (folder / "vocab.json").write_text("{}")
    assert tokenizer_digest(folder, 10) == before
    file.write_text(json.dumps({**rules, "model": {"vocab": {"b": 0}}}))
    assert tokenizer_digest(folder, 10) != before


def test_older_tokenizers_are_all_of_their_files(folder: Path) -> None:
    (folder / "vocab.json").write_text("{}")
    vocabulary = tokenizer_digest(folder, 10)
    (folder / "merges.txt").write_text("a b")
    both = tokenizer_digest(folder, 10)
    (folder / "merges.txt").write_text("b a")
    assert len({vocabulary, both, tokenizer_digest(folder, 10)}) == 3


def test_without_a_tokenizer_prompts_are_ids(folder: Path) -> None:
    assert tokenizer_digest(folder, 10) == "ids:10"


@pytest.mark.parametrize("content", ["", "{", "17", '"text"', "\xff"])
def test_a_broken_tokenizer_is_unknown(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(UnknownIdentity) as caught:
        tokenizer_digest(folder, 10)
    assert one_line(caught, folder / "tokenizer.json")


# Memory


def test_a_file_is_read_once(folder: Path) -> None:
    file, reads = folder / "weights", Reads()
    file.write_bytes(b"content")
    assert digest_file(file, reads) == digest_file(file, reads) == hashlib.sha256(b"content").hexdigest()
    assert digest_file(folder / ".." / "model" / "weights", reads) == digest_file(file, reads)
    assert reads.count == 1


def test_a_change_is_seen_whatever_it_leaves_alike(folder: Path) -> None:
    file, reads = folder / "weights", Reads()
    file.write_bytes(b"content")
    status = file.stat()
    digest_file(file, reads)
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert digest_file(file, reads) == hashlib.sha256(b"CONTENT").hexdigest()
    os.utime(file)
    digest_file(file, reads)
    assert reads.count == 3


def test_another_file_of_that_name_is_seen(folder: Path) -> None:
    file, reads = folder / "weights", Reads()
    file.write_bytes(b"content")
    digest_file(file, reads)
    other = folder / "other"
    other.write_bytes(b"CONTENT")
    status = file.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    assert digest_file(file, reads) == hashlib.sha256(b"CONTENT").hexdigest()


def test_a_file_that_changes_while_it_is_read_is_unknown(folder: Path) -> None:
    file = folder / "weights"
    file.write_bytes(b"content")

    def disturbed(opened: BufferedReader) -> str:
        file.write_bytes(b"other, longer content")
        return opened.read().hex()

    with pytest.raises(UnknownIdentity, match="being changed"):
        digest_file(file, disturbed)
    assert not list(cache_folder().rglob("*.json")), "what is not known is not remembered"


def test_digests_of_one_file_are_kept_apart(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text("{ }")
    assert digest_file(file) != tokenizer_digest(folder, 1)
    assert digest_file(file) == hashlib.sha256(b"{ }").hexdigest()


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "17", '{"state": null}', '{"state": [], "digest": 1}', "\xff"]
)
def test_a_damaged_memory_is_an_empty_one(folder: Path, damage: str) -> None:
    file, reads = folder / "weights", Reads()
    file.write_bytes(b"content")
    digest_file(file, reads)
    (remembered,) = cache_folder().rglob("*.json")
    remembered.write_text(damage, encoding="latin-1")
    assert digest_file(file, reads) == hashlib.sha256(b"content").hexdigest()
    digest_file(file, reads)
    assert reads.count == 2


def test_a_memory_that_cannot_be_kept_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reads = folder / "weights", Reads()
    file.write_bytes(b"content")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file where a folder should be, also for root
    for _ in range(2):
        assert digest_file(file, reads) == hashlib.sha256(b"content").hexdigest()
    assert reads.count == 2


def test_no_home_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    file = folder / "weights"
    file.write_bytes(b"content")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        cache_folder()
    assert digest_file(file) == hashlib.sha256(b"content").hexdigest()


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache" / "droidspeak"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "droidspeak"


_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from droidspeak.storage.digests import digest_file
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    for file in Path(sys.argv[1]).iterdir():
        file.touch()
        digest_file(file)
"""


def test_processes_share_the_memory(folder: Path, tmp_path: Path) -> None:
    content = {folder / f"shard-{n}": b"%d" % n for n in range(5)}
    for file, data in content.items():
        file.write_bytes(data)
    end = tmp_path / "end"
    command = [sys.executable, "-c", _AGAIN_AND_AGAIN, str(folder), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        for _ in range(50):
            for file, data in content.items():
                with suppress(UnknownIdentity):  # "is being changed"
                    assert digest_file(file) == hashlib.sha256(data).hexdigest()
        end.touch()
        assert other.wait(60) == 0
    assert len(list((cache_folder() / "digests").iterdir())) == 5, "one file each, and nothing is left over"


def test_read_json_wants_an_object(folder: Path) -> None:
    file = folder / "config.json"
    for content, complaint in (("[]", "not a JSON object"), ("{", "not JSON")):
        file.write_text(content)
        with pytest.raises(UnknownIdentity, match=complaint) as caught:
            read_json(file)
        assert one_line(caught, file)
    file.unlink()
    with pytest.raises(UnknownIdentity, match="cannot be read"):
        read_json(file)
