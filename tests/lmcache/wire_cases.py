"""The real LMCache engine with its own `lm://` client, against our daemon; `test_wire_engine` runs this.

python wire_cases.py store|retrieve PORT FOLDER
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import cpu_engine
import yaml
from cpu_engine import Engine, same, tokens_of

CHUNK, COUNT = 64, 256


def engine_at(port: int, folder: Path, *, layerwise: bool) -> Engine:
    config = {
        "chunk_size": CHUNK,
        "local_cpu": False,
        "max_local_cpu_size": 0.05,
        "use_layerwise": layerwise,
        "remote_url": f"lm://127.0.0.1:{port}",
        "remote_serde": "naive",
    }
    path = folder / f"wire-{layerwise}.yaml"
    path.write_text(yaml.safe_dump(config))
    return Engine(str(path), instance=f"wire-{layerwise}")


def store(engine: Engine) -> None:
    tokens = tokens_of(COUNT)
    assert engine.lookup(tokens) == 0
    engine.store(tokens, engine.kv(1))
    # The daemon says that a chunk is there when a tier that outlives it has it.
    end = time.monotonic() + 60
    while engine.lookup(tokens) < COUNT:
        assert time.monotonic() < end, f"{engine.lookup(tokens)} tokens"
        time.sleep(0.05)
    retrieve(engine)


def retrieve(engine: Engine) -> None:
    tokens, into = tokens_of(COUNT), engine.kv()
    free = engine.free_bytes()
    assert engine.lookup(tokens) == COUNT
    assert engine.retrieve(tokens, into) == COUNT
    assert same(engine.kv(1), into, COUNT)
    other = tokens.clone()
    other[2 * CHUNK] += 1
    assert engine.lookup(other) == 2 * CHUNK
    assert engine.free_bytes() == free


def run(step: str, port: int, folder: Path) -> dict[str, str]:
    report = {}
    for layerwise in (False, True):
        name = f"{step} {'layers' if layerwise else 'whole'}"
        try:
            engine = engine_at(port, folder, layerwise=layerwise)
            {"store": store, "retrieve": retrieve}[step](engine)
            engine.close()
            report[name] = "ok"
        except Exception:  # noqa: BLE001 - it goes into the report
            report[name] = traceback.format_exc(limit=-4)
            Engine.close_all()
    return report


if __name__ == "__main__":
    print("REPORT " + json.dumps(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))), flush=True)
    cpu_engine.leave()
