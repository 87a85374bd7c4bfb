"""Identity: stable ids, one form for what means the same, and reasons for what differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from droidspeak.errors import Incompatible, UnknownIdentity
from droidspeak.storage.identity import Architecture, Mismatch, SourceManifest, require_compatible

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}


def manifest(**changes: Any) -> SourceManifest:
    fields = {"weights": "w", "architecture": Architecture.from_config(LLAMA), "tokenizer": "t"}
    return SourceManifest(**(fields | changes))


def architecture(**changes: Any) -> Architecture:
    return dataclasses.replace(Architecture.from_config(LLAMA), **changes)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; digests are remembered beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder


# Ids


def test_the_id_is_the_same_for_ever() -> None:
    # Chunks lie under these ids: if this fails, every store becomes unreadable.
    assert manifest().source_id == "9b8612c9e36890ac40d61bf4ae325ee582851cba64bcffc36a0808ff8154d459"
    assert (
        manifest(adapter="a").source_id == "3e5ca55704ca94b29d29cf67328c0443830360d6dad2cb5ed27d07cb95ccb116"
    )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SourceManifest)])
def test_every_field_changes_the_id(field: str) -> None:
    value = architecture(layers=1) if field == "architecture" else "other"
    assert manifest(**{field: value}).source_id != manifest().source_id


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Architecture)])
def test_every_field_of_the_architecture_changes_the_id(field: str) -> None:
    other = architecture(**{field: 1 if isinstance(getattr(architecture(), field), int) else "other"})
    assert manifest(architecture=other).source_id != manifest().source_id


def test_no_weights_no_manifest() -> None:
    with pytest.raises(UnknownIdentity, match=r"^the weights have no digest[^\n]*$"):
        manifest(weights="")


# Folders


def test_a_folder_is_its_content(model: Path, tmp_path: Path) -> None:
    before = SourceManifest.from_folder(model)
    assert before.architecture == Architecture.from_config(LLAMA)
    assert SourceManifest.from_folder(str(model.rename(tmp_path / "moved"))) == before


def test_the_dtype_in_use_counts(model: Path) -> None:
    assert SourceManifest.from_folder(model, dtype="float16").architecture.dtype == "float16"
    assert SourceManifest.from_folder(model, dtype="float16") != SourceManifest.from_folder(model)


def test_an_adapter_makes_another_source(model: Path, tmp_path: Path) -> None:
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"lora")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 16}')
    plain = SourceManifest.from_folder(model)
    adapted = SourceManifest.from_folder(model, adapter=adapter)
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 32}')
    scaled = SourceManifest.from_folder(model, adapter=adapter)
    assert len({m.source_id for m in (plain, adapted, scaled)}) == 3
    require_compatible(plain, adapted)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without_what_is_needed_is_unknown(model: Path, file: str) -> None:
    (model / file).unlink()
    with pytest.raises(UnknownIdentity, match=rf"^[^\n]*{file}[^\n]*$"):
        SourceManifest.from_folder(model)


# Architectures


@pytest.mark.parametrize(
    "missing", ["model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"]
)
def test_a_missing_entry_is_unknown(missing: str) -> None:
    config = {key: value for key, value in LLAMA.items() if key != missing}
    with pytest.raises(UnknownIdentity, match=f"^[^\n]*'{missing}'[^\n]*$"):
        Architecture.from_config(config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0, "num_key_value_heads": 1},
        {"hidden_size": []},
        {"text_config": 3},
        {"rope_scaling": 3},
        {"layer_types": 3},
    ],
    ids=str,
)
def test_a_wrong_entry_is_unknown(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnknownIdentity, match=r"^model configuration[^\n]*$"):
        Architecture.from_config({**LLAMA, **wrong})


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat17", "nn", "torch.auto"])
def test_an_unknown_dtype_is_unknown(dtype: str | None) -> None:
    with pytest.raises(UnknownIdentity, match=r"^[^\n]*dtype[^\n]*$"):
        Architecture.from_config({**LLAMA, "torch_dtype": dtype})


@pytest.mark.parametrize("dtype", ["half", "float16", "torch.float16", str(torch.half)])
def test_one_name_for_a_dtype(dtype: str) -> None:
    assert Architecture.from_config(LLAMA, dtype).dtype == "float16"


def test_a_text_model_inside_another_is_what_counts() -> None:
    inner = {**LLAMA, "model_type": "gemma3_text"}
    outer = {"model_type": "gemma3", "torch_dtype": "float32", "text_config": inner}
    assert Architecture.from_config(outer) == Architecture.from_config(inner)


def test_heads_without_groups_and_given_head_dims() -> None:
    plain = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert Architecture.from_config(plain).kv_heads == 32
    assert Architecture.from_config(LLAMA).head_dim == 128
    assert Architecture.from_config({**LLAMA, "head_dim": 256}).head_dim == 256


# Rotary embeddings


def rope(**config: Any) -> str:
    base = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    return Architecture.from_config({**base, **config}).rope


LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 8192}
LOCAL = {"rope_type": "default", "rope_theta": 10000}
SAME_ROPE: dict[str, list[dict[str, Any]]] = {
    "default": [
        {},
        {"rope_theta": 10000},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 1.0}},
    ],
    "llama3": [
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
    "linear": [
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
    "partial": [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
    "yarn": [
        {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}},
    ],
    "yarn without its origin": [{"rope_scaling": {"type": "yarn", "factor": 4}}],
    "by kind": [
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": LOCAL}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1000000}, "sliding_attention": {}}},
    ],
}


@pytest.mark.parametrize("configs", SAME_ROPE.values(), ids=SAME_ROPE)
def test_one_form_for_the_same_rope(configs: list[dict[str, Any]]) -> None:
    assert len({rope(**config) for config in configs}) == 1


def test_other_ropes_differ() -> None:
    assert len({rope(**configs[0]) for configs in SAME_ROPE.values()}) == len(SAME_ROPE)


def test_a_scaling_that_cannot_be_known_is_unknown() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    with pytest.raises(UnknownIdentity, match="max_position_embeddings"):
        Architecture.from_config({**config, "rope_scaling": {"type": "yarn", "factor": 4}})


OLD_FILES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MistralConfig": {"model_type": "mistral", "rope_scaling": None, "sliding_window": 4096},
    "Qwen2Config": {
        "model_type": "qwen2",
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
    },
    "PhiConfig": {"model_type": "phi", "rope_scaling": None, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize(("kind", "changes"), OLD_FILES.items(), ids=OLD_FILES)
def test_transformers_5_changes_nothing(kind: str, changes: dict[str, Any]) -> None:
    """The configuration of a loaded model means the same as the file that transformers 4 wrote."""
    file = {**LLAMA, **changes}
    loaded = getattr(pytest.importorskip("transformers"), kind)(**file).to_dict()
    assert "rope_scaling" not in loaded
    assert Architecture.from_config(loaded, "bfloat16") == Architecture.from_config(file)


# Attention


def attention(**config: Any) -> str:
    return Architecture.from_config({**LLAMA, **config}).attention


def test_one_form_for_full_attention() -> None:
    full = [
        {},
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 32},
        {"layer_types": ["full_attention"] * 32, "sliding_window": 4096},
    ]
    assert len({attention(**config) for config in full}) == 1


def test_other_windows_differ() -> None:
    alternating = ["sliding_attention", "full_attention"] * 16
    kinds = [
        {},
        {"sliding_window": 4096},
        {"sliding_window": 1024},
        {"sliding_window": 4096, "layer_types": alternating},
        {"sliding_window": 4096, "layer_types": alternating[::-1]},
    ]
    assert len({attention(**config) for config in kinds}) == len(kinds)


# Compatibility


def test_only_weights_and_adapters_may_differ() -> None:
    require_compatible(manifest(weights="sender", adapter="a"), manifest(weights="receiver"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": "head-major-1"}, Mismatch.LAYOUT),
        ({"tokenizer": "other"}, Mismatch.TOKENIZER),
        ({"architecture": architecture(rope="{}")}, Mismatch.ROPE),
        ({"architecture": architecture(dtype="float16")}, Mismatch.DTYPE),
        *(
            ({"architecture": architecture(**{field: value})}, Mismatch.ARCHITECTURE)
            for field, value in {
                "model_type": "mistral",
                "layers": 16,
                "kv_heads": 4,
                "head_dim": 64,
                "hidden_size": 2048,
                "vocab_size": 32000,
                "attention": "{}",
            }.items()
        ),
    ],
    ids=str,
)
def test_the_reason_of_a_mismatch(change: dict[str, Any], reason: Mismatch) -> None:
    sender, receiver = manifest(**change), manifest()
    for pair in ((sender, receiver), (receiver, sender)):
        with pytest.raises(Incompatible, match=f"^{reason}: sender has [^\n]*$") as caught:
            require_compatible(*pair)
        assert caught.value.reason == reason


def test_the_message_of_a_mismatch_tells_both_sides() -> None:
    other = manifest(architecture=architecture(dtype="float16"))
    with pytest.raises(Incompatible, match=r"^other_dtype: sender has float16, receiver has bfloat16$"):
        require_compatible(other, manifest())
