"""Writes the golden wire bytes with LMCache's own classes: `python wire_golden.py FOLDER`.

`lm-wire-<version>.bin` holds the messages one behind the other, `lm-wire-<version>.json` what each of them
says, in order. Only for a new release of LMCache; tests read the files.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def request(
    command: str, key: str, fmt: int, dtype: str | None, *shape: int, length: int = 0
) -> dict[str, Any]:
    return {
        "command": command,
        "key": key,
        "fmt": fmt,
        "dtype": dtype,
        "shape": list(shape),
        "length": length,
    }


REQUESTS = [
    request("PUT", "Qwen/Qwen2.5-7B@1@0@deadbeefcafe@bfloat16@3", 1, "bfloat16", 2, 1, 16, 16, length=1024),
    request("PUT", "org/m@1@0@-1ef9e941d77d97ff@bfloat16@1", 2, "bfloat16", 8, 2, 16, length=512),
    request("PUT", "org/m@2@1@1f@half", 3, "float16", 2, 4, 8, length=128),
    request("PUT", "org/m@1@0@20@float", 6, "float32", 3, 4, 8, length=384),
    request("PUT", "org/m@1@0@21@double", 8, "float64", 4, 2, length=64),
    request("PUT", "org/m@1@0@22@uint8", 1, "uint8", 2, 1, 4, 8, length=64),
    request("PUT", "org/m@1@0@23@fp8_e4m3fn", 1, "float8_e4m3fn", 2, 1, 4, 8, length=64),
    request("PUT", "org/m@1@0@24@fp8_e5m2", 7, "float8_e5m2", 4, 8, length=32),
    request("PUT", "org/m@1@0@25@bfloat16", 4, "uint8", 77, length=77),
    request("PUT", "org/m@1@0@26@bfloat16", 5, None, 33, length=33),
    request("PUT", "org/m@1@0@27@bfloat16@tag%value", 1, "bfloat16", 2, 2, 4, 8, length=256),
    request("PUT", "modèle@1@0@28@bfloat16", 1, "bfloat16", 2, 1, 1, 1, length=4),
    *(
        request(command, key, 1, "float16", 0, 0, 0, 0)
        for command in ("GET", "EXIST", "HEALTH")
        for key in ("org/m@1@0@-1ef9e941d77d97ff@bfloat16@1", "m" * 126 + "@1@0@abcdef@bfloat16@31")
    ),
]

REPLIES: list[dict[str, Any]] = [
    {"code": 400, "fmt": 1, "dtype": "float16", "shape": [0, 0, 0, 0], "length": 0},
    {"code": 200, "fmt": 1, "dtype": "float16", "shape": [0, 0, 0, 0], "length": 0},
    *(
        {"code": 200, **{name: put[name] for name in ("fmt", "dtype", "shape", "length")}}
        for put in REQUESTS
        if put["command"] == "PUT"
    ),
]


def main(folder: Path) -> None:
    import torch
    from lmcache.utils import parse_cache_key
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode

    def described(row: dict[str, Any]) -> tuple[Any, ...]:
        dtype = getattr(torch, row["dtype"]) if row["dtype"] else None
        return row["length"], MemoryFormat(row["fmt"]), dtype, torch.Size(row["shape"])

    requests = [
        ClientMetaMessage(ClientCommand[row["command"]], parse_cache_key(row["key"]), *described(row))
        for row in REQUESTS
    ]
    replies = [ServerMetaMessage(ServerReturnCode(row["code"]), *described(row)) for row in REPLIES]
    for message in (*requests, *replies):
        assert type(message).deserialize(message.serialize()).serialize() == message.serialize()
    name = f"lm-wire-{version('lmcache')}"
    (folder / f"{name}.bin").write_bytes(b"".join(message.serialize() for message in (*requests, *replies)))
    text = json.dumps({"requests": REQUESTS, "replies": REPLIES}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
