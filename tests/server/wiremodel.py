"""What a daemon must answer, byte for byte: the protocol over a dict, written apart from the daemon."""

from __future__ import annotations

import struct
import unicodedata
from dataclasses import dataclass, field

REQUEST = struct.Struct("=9i150s")
REPLY = struct.Struct("=9i")
NOTHING = (0, 1, 2, 0, 0, 0, 0, 0)  # length, fmt, dtype, shape, location of a reply without an object
HIT, MISS = REPLY.pack(200, *NOTHING), REPLY.pack(400, *NOTHING)
ITEM_BYTES = {1: 2, 2: 2, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 1}
BINARY = (4, 5)


@dataclass
class WireModel:
    """A tenant's objects, and how one connection's bytes change and read them.

    Attributes:
        objects: by key: fmt, dtype, shape and bytes.
    """

    max_object: int
    objects: dict[bytes, tuple[int, int, tuple[int, ...], bytes]] = field(default_factory=dict)

    def serve(self, stream: bytes) -> tuple[bytes, str, list[str]]:
        """All that is answered to `stream` and its end, why it ends, and why requests were refused."""
        answers, refused = bytearray(), []
        while stream:
            if len(stream) < REQUEST.size:
                return bytes(answers), "cut_short", refused
            command, length, fmt, dtype, _, *shape, padded = REQUEST.unpack_from(stream)
            stream = stream[REQUEST.size :]
            if command not in (1, 2, 3, 5):
                return bytes(answers), "bad_command", refused
            if length < 0 or length > (self.max_object if command == 1 else 0):
                return bytes(answers), "bad_length", refused
            key = padded.rstrip(b" ")
            fault = None if command == 5 else key_fault(key)
            if command == 1:
                fault = fault or object_fault(length, fmt, dtype, shape)
            if fault:
                refused.append(fault)
            if command == 1:
                if len(stream) < length:
                    return bytes(answers), "cut_short", refused
                if not fault:
                    self.objects[key] = (fmt, dtype, tuple(shape), stream[:length])
                stream = stream[length:]
            else:
                answers += self._answer(command, key)
        return bytes(answers), "by_client", refused

    def _answer(self, command: int, key: bytes) -> bytes:
        if command == 5:
            return HIT
        if key not in self.objects:
            return MISS
        fmt, dtype, shape, body = self.objects[key]
        return HIT if command == 3 else REPLY.pack(200, len(body), fmt, dtype, *shape, 0) + body


def key_fault(key: bytes) -> str | None:
    """`bad_key` for what names nothing, or may name two things."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return "bad_key"
    odd = any(unicodedata.category(letter)[0] in "CZ" and letter != " " for letter in text)
    cut = len(key) == 150 and any(byte > 127 for byte in key)
    return "bad_key" if not text or odd or cut else None


def object_fault(length: int, fmt: int, dtype: int, shape: list[int]) -> str | None:
    """Why `length` bytes are not what fmt, dtype and shape say."""
    if not 0 <= fmt <= 8 or not 0 <= dtype <= 8:
        return "bad_format"
    if fmt in BINARY:
        return None if length > 0 and shape == [length, 0, 0, 0] else "bad_shape"
    if dtype == 0:
        return "bad_format"
    elements, ended = 1, False
    for dimension in shape:
        if dimension < 0 or (ended and dimension):
            return "bad_shape"
        ended = dimension == 0
        elements *= dimension or 1
    return None if length and shape[0] and elements * ITEM_BYTES[dtype] == length else "bad_shape"
