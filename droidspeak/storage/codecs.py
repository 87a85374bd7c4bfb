"""Codecs: how a tensor becomes the bytes of a slot, and back.

`raw` keeps the bytes as they are, so a slot can be read straight into its place. `zstd` splits the
floats into byte planes first: signs and exponents lie side by side and compress, mantissas do not
(the idea of Blosc's shuffle filter). Both are lossless.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from droidspeak.errors import ChunkCorrupt, ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Codec", "RawCodec", "ZstdCodec", "as_bytes", "get_codec", "is_lossless"]


class Codec(ABC):
    """Turns a contiguous tensor into a flat `uint8` tensor and back, bit for bit if `lossless`."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = True

    @abstractmethod
    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stored bytes, `uint8`, one dimension."""

    @abstractmethod
    def decode(self, stored: torch.Tensor, out: torch.Tensor) -> None:
        """Fills `out` (contiguous, its dtype and shape are the slot's). Raises `ChunkCorrupt`."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat `uint8` view of a contiguous tensor."""
    import torch  # in the functions: who only asks what codecs there are shall not wait for it

    return tensor.reshape(-1).view(torch.uint8)


class RawCodec(Codec):
    """The tensor's own bytes; encoding and decoding move nothing that is in place already."""

    name = "raw"

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        return as_bytes(tensor)

    def decode(self, stored: torch.Tensor, out: torch.Tensor) -> None:
        target = as_bytes(out)
        if stored.numel() != target.numel():
            raise ChunkCorrupt(f"slot holds {stored.numel()} bytes, its shape needs {target.numel()}")
        if stored.data_ptr() != target.data_ptr():
            target.copy_(stored)


class ZstdCodec(Codec):
    """Byte planes, then one zstandard frame.

    Args:
        level: zstandard level; 1 is within a few percent of the best on KV bytes and the fastest.
    """

    name = "zstd"

    def __init__(self, level: int = 1) -> None:
        self._level = level

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch
        import zstandard

        planes = as_bytes(tensor).view(-1, tensor.element_size()).t().contiguous()
        packed = zstandard.ZstdCompressor(level=self._level).compress(planes.numpy().data)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def decode(self, stored: torch.Tensor, out: torch.Tensor) -> None:
        import torch
        import zstandard

        target = as_bytes(out)
        packed = stored.cpu().numpy().data
        try:
            # The frame states its own size; it is compared before anything is allocated for it.
            size = zstandard.frame_content_size(packed)
            if size != target.numel():
                raise ChunkCorrupt(f"zstd frame of {size} bytes, the slot's shape needs {target.numel()}")
            planes = torch.empty(size, dtype=torch.uint8)
            got = zstandard.ZstdDecompressor().stream_reader(packed).readinto(planes.numpy().data)
        except zstandard.ZstdError as error:
            raise ChunkCorrupt(f"zstd frame cannot be read: {error}") from None
        if got != size:
            raise ChunkCorrupt(f"zstd frame ends after {got} of {size} bytes")
        width = out.element_size()
        target.view(-1, width).copy_(planes.view(width, -1).t())


_CODECS: dict[str, Callable[[], Codec]] = {RawCodec.name: RawCodec, ZstdCodec.name: ZstdCodec}


def get_codec(name: str) -> Codec:
    """The codec called `name`. Raises `ConfigError` naming the codecs there are."""
    try:
        return _CODECS[name]()
    except KeyError:
        raise ConfigError(f"unknown codec {name!r}; allowed: {', '.join(sorted(_CODECS))}") from None


def is_lossless(name: str) -> bool:
    """Whether the codec called `name` keeps every bit; `False` for one that is not known."""
    return name in _CODECS and _CODECS[name]().lossless
