"""The `lm://` wire of LMCache 0.5.6, as unmodified clients speak it.

    request   186 bytes: command, length, fmt, dtype, location, four dimensions, key; a PUT's bytes follow
    reply      36 bytes: code, length, fmt, dtype, four dimensions, location; a GET's bytes follow

Integers are C `int` in native order; the key is UTF-8, padded on the right with blanks to 150 bytes. A PUT
has no reply. Requests of one connection are answered in order.

Source: lmcache/v1/protocol.py, lmcache/v1/server/__main__.py.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

__all__ = [
    "DTYPES",
    "HIT",
    "MISS",
    "REPLY",
    "REQUEST",
    "BadFrame",
    "Command",
    "Description",
    "Format",
    "Request",
    "reply",
]

REQUEST = struct.Struct("iiiiiiiii150s")
REPLY = struct.Struct("iiiiiiiii")
KEY_BYTES = 150
_SUCCESS, _FAIL = 200, 400

DTYPES: dict[int, torch.dtype | None] = {
    0: None,
    1: torch.float16,
    2: torch.float16,
    3: torch.bfloat16,
    4: torch.float32,
    5: torch.float64,
    6: torch.uint8,
    7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}


class Command(IntEnum):
    """What is asked. LIST (4) stands in LMCache's enumeration, but its server never answers it."""

    PUT = 1
    GET = 2
    EXIST = 3
    HEALTH = 5


class Format(IntEnum):
    """What an object's dimensions mean (`MemoryFormat`)."""

    UNDEFINED = 0
    KV_2LTD = 1
    KV_T2D = 2
    KV_2TD = 3
    BINARY = 4
    BINARY_BUFFER = 5
    KV_MLA_FMT = 6
    EC_TD = 7
    HS_TD = 8


_COMMANDS = frozenset(Command)
_FORMATS = frozenset(Format)
_BINARY = frozenset((Format.BINARY, Format.BINARY_BUFFER))


class BadFrame(Exception):
    """A request after which nothing on the connection can be trusted; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Description(NamedTuple):
    """What an object is, in the wire's codes; `shape` is padded with zeros to four dimensions."""

    fmt: int
    dtype: int
    shape: tuple[int, int, int, int]

    @property
    def tensor(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the object; binary ones are flat bytes."""
        dtype = DTYPES[self.dtype]
        if self.fmt in _BINARY or dtype is None:
            return torch.uint8, (self.shape[0],)
        return dtype, _unpadded(self.shape)

    def fault(self, length: int) -> str | None:
        """Why an object of `length` bytes cannot be this, or `None`."""
        if self.fmt not in _FORMATS or self.dtype not in DTYPES:
            return "bad_format"
        if self.fmt not in _BINARY and DTYPES[self.dtype] is None:
            return "bad_format"
        if self.fmt in _BINARY and any(self.shape[1:]):
            return "bad_shape"
        dtype, shape = self.tensor
        if min(shape) <= 0 or math.prod(shape) * dtype.itemsize != length:
            return "bad_shape"
        return None

    def __str__(self) -> str:
        return " ".join(map(str, (self.fmt, self.dtype, *self.shape)))

    @classmethod
    def parse(cls, text: str) -> Description:
        """What `str` wrote. Raises `ValueError`."""
        fmt, dtype, s0, s1, s2, s3 = map(int, text.split())
        return cls(fmt, dtype, (s0, s1, s2, s3))


@dataclass(frozen=True, slots=True)
class Request:
    """One request's header.

    Attributes:
        length: bytes that follow; 0 unless it is a PUT.
        key: exact bytes, without the padding.
    """

    command: Command
    length: int
    description: Description
    key: bytes

    @classmethod
    def parse(cls, header: bytes | bytearray | memoryview, max_object: int) -> Request:
        """The request in the `REQUEST.size` bytes of `header`.

        Raises:
            BadFrame: `bad_command`, or `bad_length` for a length that is negative, above `max_object`,
                or not 0 where nothing follows.
        """
        command, length, fmt, dtype, _location, s0, s1, s2, s3, key = REQUEST.unpack(header)
        if command not in _COMMANDS:
            raise BadFrame("bad_command")
        if not 0 <= length <= (max_object if command == Command.PUT else 0):
            raise BadFrame("bad_length")
        return cls(Command(command), length, Description(fmt, dtype, (s0, s1, s2, s3)), key.rstrip(b" "))

    @property
    def fault(self) -> str | None:
        """Why this is answered as a miss, or its object thrown away, though the frame is sound."""
        if self.command is Command.HEALTH:
            return None
        if not _is_name(self.key):
            return "bad_key"
        return self.description.fault(self.length) if self.command is Command.PUT else None


def _is_name(key: bytes) -> bool:
    """Whether a key names one object: LMCache cuts UTF-8 at 150 bytes, and two keys may become one."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return False
    return text.isprintable() and bool(text) and (len(key) < KEY_BYTES or text.isascii())


def _unpadded(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 1 and shape[end - 1] == 0:
        end -= 1
    return shape[:end]


def reply(code: int, length: int, description: Description) -> bytes:
    """A reply's header; `location` is always "none"."""
    return REPLY.pack(code, length, description.fmt, description.dtype, *description.shape, 0)


_NOTHING = Description(Format.KV_2LTD, 2, (0, 0, 0, 0))
HIT = reply(_SUCCESS, 0, _NOTHING)
MISS = reply(_FAIL, 0, _NOTHING)
