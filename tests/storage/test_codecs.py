"""Codecs: bit-exact round trips, and frames that are not what they should be."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from droidspeak.errors import ChunkCorrupt, ConfigError
from droidspeak.storage.codecs import RawCodec, ZstdCodec, as_bytes, get_codec
from droidspeak.storage.testing import DTYPES

CODECS = ["raw", "zstd"]
SHAPES = st.sampled_from([(1,), (3,), (16, 8), (16, 2, 4), (1, 1, 1), (0,), (0, 2, 4), (16, 0, 4)])


@given(name=st.sampled_from(CODECS), dtype=st.sampled_from(DTYPES), shape=SHAPES, data=st.data())
def test_round_trip_is_bit_exact(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], data: st.DataObject
) -> None:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    bits = data.draw(st.binary(min_size=nbytes, max_size=nbytes))
    tensor = torch.tensor(list(bits), dtype=torch.uint8).view(dtype).view(shape)
    codec = get_codec(name)
    stored = codec.encode(tensor)
    assert stored.dtype == torch.uint8
    assert stored.ndim == 1
    out = torch.empty(shape, dtype=dtype)
    codec.decode(stored, out)
    assert bytes(as_bytes(out).tolist()) == bits


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_special_values_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), limits.max, limits.min, limits.tiny]
    tensor = torch.tensor([*values, limits.tiny / 2, limits.smallest_normal, limits.eps], dtype=dtype)
    as_bytes(tensor)[-1] ^= 1
    out = torch.empty_like(tensor)
    codec = get_codec(name)
    codec.decode(codec.encode(tensor), out)
    assert torch.equal(as_bytes(out), as_bytes(tensor))


def test_raw_encoding_and_decoding_move_nothing() -> None:
    tensor = torch.randn(4, 4)
    codec = RawCodec()
    stored = codec.encode(tensor)
    assert stored.data_ptr() == tensor.data_ptr()
    before = tensor.clone()
    codec.decode(stored, tensor)
    assert torch.equal(tensor, before)


def test_byte_planes_make_floats_smaller() -> None:
    tensor = torch.randn(64, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = ZstdCodec().encode(tensor)
    plain = zstandard.ZstdCompressor(level=1).compress(as_bytes(tensor).numpy().data)
    assert stored.numel() < 0.85 * tensor.nbytes
    assert stored.numel() < len(plain)


@pytest.mark.parametrize("nbytes", [0, 30, 31, 33, 64])
def test_raw_of_the_wrong_size_is_corrupt(nbytes: int) -> None:
    with pytest.raises(ChunkCorrupt, match=f"{nbytes} bytes, its shape needs 32"):
        RawCodec().decode(torch.zeros(nbytes, dtype=torch.uint8), torch.empty(16, dtype=torch.bfloat16))


@given(stored=st.binary(max_size=40))
@example(stored=b"")
def test_what_is_no_frame_is_corrupt(stored: bytes) -> None:
    out = torch.empty(16, 8, dtype=torch.bfloat16)
    with pytest.raises(ChunkCorrupt):
        ZstdCodec().decode(torch.tensor(list(stored), dtype=torch.uint8), out)


def frame(data: bytes) -> torch.Tensor:
    return torch.tensor(list(zstandard.ZstdCompressor().compress(data)), dtype=torch.uint8)


@pytest.mark.parametrize("nbytes", [0, 1, 31, 33, 1 << 20])
def test_a_frame_of_another_size_is_corrupt(nbytes: int) -> None:
    with pytest.raises(ChunkCorrupt, match=f"frame of {nbytes} bytes"):
        ZstdCodec().decode(frame(bytes(nbytes)), torch.empty(16, dtype=torch.bfloat16))


def test_a_frame_that_hides_its_size_is_corrupt() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(32))
    with pytest.raises(ChunkCorrupt):
        ZstdCodec().decode(
            torch.tensor(list(packed), dtype=torch.uint8), torch.empty(16, dtype=torch.bfloat16)
        )


def test_a_frame_cut_anywhere_is_corrupt() -> None:
    tensor = torch.randn(16, 8).bfloat16()
    stored = ZstdCodec().encode(tensor)
    for end in range(stored.numel()):
        with pytest.raises(ChunkCorrupt):
            ZstdCodec().decode(stored[:end], torch.empty_like(tensor))


def test_codecs_by_name() -> None:
    assert isinstance(get_codec("raw"), RawCodec)
    assert isinstance(get_codec("zstd"), ZstdCodec)
    assert all(get_codec(name).name == name and get_codec(name).lossless for name in CODECS)
    with pytest.raises(ConfigError, match="unknown codec 'gzip'; allowed: raw, zstd"):
        get_codec("gzip")
