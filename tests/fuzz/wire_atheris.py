"""Coverage-guided fuzzing of what reads the wire: `python wire_atheris.py -runs=20000 [CORPUS]`.

An input is a request and a body. Whatever it is, the parser and the model of the protocol agree; a PUT that
both take becomes a chunk that answers with the same bytes, also after it was written and read again.

libFuzzer's options are allowed; without `-runs` it goes on until it is stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["droidspeak.integrations.server", "droidspeak.storage.objects"]):
    from droidspeak.integrations.server import objects, wire

from droidspeak.storage import Chunk

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
import wiremodel

MAX_OBJECT = 1 << 16


def one_input(data: bytes) -> None:
    if len(data) < wire.REQUEST.size:
        return
    header, body = data[: wire.REQUEST.size], data[wire.REQUEST.size :]
    _, ended, refused = wiremodel.WireModel(MAX_OBJECT).serve(header)
    request = parsed(header)
    if isinstance(request, str):
        assert ended == request
        return
    assert request.fault == (refused[0] if refused else None), (request, refused)
    if request.fault is None and request.command is wire.Command.PUT:
        keep_and_answer(request, body[: request.length].ljust(request.length, b"."))


def parsed(header: bytes) -> wire.Request | str:
    """The request, or why it is none."""
    try:
        return wire.Request.parse(header, MAX_OBJECT)
    except wire.BadFrame as bad:
        return bad.reason


def keep_and_answer(request: wire.Request, body: bytes) -> None:
    stored = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    for codec in ("raw", "zstd"):
        chunk = objects.chunk_of("", request, stored, codec)
        for kept in (chunk, Chunk.from_bytes(chunk.to_bytes(), chunk.key)):
            header, answer = objects.answer_of(kept, request.key)
            assert bytes(answer) == body
            assert header == wire.reply(200, len(body), request.description)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
