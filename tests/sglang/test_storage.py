"""Our store behind SGLang's own factory and base class, with pages as its controller hands them over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from droidspeak.errors import ConfigError

PAGE = (2, 4, 16, 8)
NAMES = [f"{number:064x}" for number in range(4)]


def config(tmp_path: Path, *, extra: dict[str, Any] | None = None, **changes: Any) -> HiCacheStorageConfig:
    own = {
        "backend_name": "droidspeak",
        "module_path": "droidspeak.integrations.sglang_backend.storage",
        "class_name": "DroidSpeakHiCache",
        "tiers": [f"disk://{tmp_path}/store?min_free=0"],
        **(extra or {}),
    }
    known = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "org/model",
        "extra_config": own,
        **changes,
    }
    fields = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    assert known.keys() <= fields, "SGLang's configuration has changed"
    return HiCacheStorageConfig(**known)


def backend(tmp_path: Path, **changes: Any) -> Any:
    """Made as SGLang makes it for `--hicache-storage-backend dynamic`."""
    return StorageBackendFactory.create_backend("dynamic", config(tmp_path, **changes), None)


def pages(count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(PAGE, generator=source).to(torch.bfloat16) for _ in range(count)]


def blank(count: int = 4) -> list[torch.Tensor]:
    """As `get_dummy_flat_data_page` makes them."""
    return [torch.zeros(PAGE, dtype=torch.bfloat16).flatten() for _ in range(count)]


def test_it_is_what_sglang_asks_for(tmp_path):
    storage = backend(tmp_path)
    assert isinstance(storage, HiCacheStorage)
    storage.close()


def test_pages_come_back_also_after_a_restart(tmp_path):
    storage = backend(tmp_path)
    assert storage.batch_exists(NAMES) == 0
    kept = pages()
    assert storage.batch_set(NAMES, kept)
    copies = [page.clone() for page in kept]
    for page in kept:
        page.zero_()  # SGLang uses its pages again
    storage.close()
    storage = backend(tmp_path)
    assert storage.batch_exists(NAMES) == 4
    got = storage.batch_get(NAMES, blank())
    assert all(torch.equal(page, copy.flatten()) for page, copy in zip(got, copies, strict=True))
    storage.close()


def test_a_prefix_ends_at_the_first_gap(tmp_path):
    storage = backend(tmp_path)
    storage.batch_set([*NAMES[:2], NAMES[3]], [*pages(2), pages(1)[0]])
    assert storage.batch_exists(NAMES) == 2
    assert [page is not None for page in storage.batch_get(NAMES, blank())] == [True, True, False, False]
    storage.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "org/other"},
        {"tp_size": 2},
        {"tp_size": 2, "tp_rank": 1},
        {"is_page_first_layout": True},
        {"extra": {"identity": "other weights"}},
    ],
    ids=str,
)
def test_engines_that_are_not_alike_do_not_meet(tmp_path, changes):
    storage = backend(tmp_path)
    storage.batch_set(NAMES, pages())
    storage.close()
    other = backend(tmp_path, **changes)
    assert other.batch_exists(NAMES) == 0
    assert other.get(NAMES[0], blank(1)[0]) is None
    other.close()


def test_a_page_of_another_size_or_dtype_is_a_miss(tmp_path):
    storage = backend(tmp_path)
    storage.set(NAMES[0], pages(1)[0])
    assert storage.get(NAMES[0], torch.zeros(8, dtype=torch.bfloat16)) is None
    target = torch.zeros(PAGE, dtype=torch.float16)
    assert storage.get(NAMES[0], target) is None
    assert not target.any()
    assert storage.counters.get("misses", "other_layout") == 2
    storage.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_a_miss(tmp_path, damage):
    storage = backend(tmp_path)
    storage.batch_set(NAMES, pages())
    storage.close()
    file = sorted((tmp_path / "store" / "chunks").rglob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-1]))
    storage = backend(tmp_path)
    targets = blank()
    found = [storage.get(name, target) for name, target in zip(NAMES, targets, strict=True)]
    assert [page is None for page in found].count(True) == 1
    assert sum(int(not target.any()) for target in targets) == 1
    storage.close()


def test_clearing_takes_this_engine_s_pages_only(tmp_path):
    mine, other = backend(tmp_path), backend(tmp_path, model_name="org/other")
    mine.batch_set(NAMES, pages())
    other.batch_set(NAMES, pages())
    mine.clear()
    assert mine.batch_exists(NAMES) == 0
    assert other.batch_exists(NAMES) == 4
    mine.close()
    other.close()


def test_a_wrong_configuration_is_told_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="unknown configuration key 'speed'"):
        backend(tmp_path, extra={"speed": 9})
    with pytest.raises(ConfigError, match="'identity'"):
        backend(tmp_path, extra={"identity": 9})
