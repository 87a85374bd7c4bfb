"""Stores of every released format stay readable, bit for bit."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from droidspeak.storage.disk import DiskTier
from droidspeak.storage.testing import assert_holds
from droidspeak.storage.tier import ChunkInfo

STORES = sorted((Path(__file__).parents[1] / "data").glob("store-*"))
_SPEC = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("golden.py"))
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)


@pytest.fixture(params=STORES, ids=lambda store: store.name)
def store(request, tmp_path):
    return shutil.copytree(request.param, tmp_path / "store")


def test_the_stores_are_there():
    assert [store.name for store in STORES] == ["store-1"]


def test_reads_every_chunk_bit_for_bit(store):
    chunks = list(golden.golden_chunks())
    with DiskTier(store, min_free=0) as tier:
        assert set(tier.keys()) == {chunk.key for chunk in chunks}
        for chunk in chunks:
            got = tier.read(chunk.key)
            for slot in chunk.payload:
                expected, decoded = chunk.tensor(slot), got.tensor(slot)
                assert decoded.dtype == expected.dtype
                assert decoded.shape == expected.shape
                assert decoded.view(torch.uint8).equal(expected.view(torch.uint8))
            assert got.header.labels == chunk.header.labels
            assert tier.head(chunk.key).e_layers == chunk.header.e_layers


def test_raw_chunks_are_still_written_the_same(store):
    """What does not depend on a compressor's version is pinned byte for byte, names of files included."""
    with DiskTier(store, min_free=0) as tier:
        for chunk in golden.golden_chunks():
            if chunk.header.codec == "raw":
                assert tier.path(chunk.key).read_bytes() == chunk.to_bytes()
                assert tier.head(chunk.key) == ChunkInfo.of(chunk)
                assert_holds(tier.read(chunk.key), chunk)


def test_the_safetensors_library_opens_every_file(store):
    files = list(store.rglob("*.safetensors"))
    assert len(files) == 7
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "droidspeak-chunk-1"
            assert all(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
