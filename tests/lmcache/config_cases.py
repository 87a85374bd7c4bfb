"""Configurations as LMCache's users have them, in the real engine; `test_configurations` runs this.

python config_cases.py FOLDER FILE...      prints one JSON line {file: "ok" or what went wrong}
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path

import cpu_engine
from cpu_engine import Engine, same, tokens_of
from engine_cases import STORAGE_WHOLE, flush

SMALL = {"chunk_size": 64, "max_local_cpu_size": 0.05}


def works(folder: Path, file: Path) -> None:
    """The engine has our plug-in, and gives back what it was given."""
    text = file.read_text().replace("/var/cache/droidspeak", str(folder / "store"))
    path = folder / file.name
    path.write_text(text)
    engine = Engine(str(path), instance=file.stem, overrides=SMALL)
    tokens, kv, into = tokens_of(256), engine.kv(1), engine.kv()
    engine.store(tokens, kv)
    flush(engine)
    # LMCache has kept a copy of its own.
    engine.engine.storage_manager.set_hot_cache(False)
    assert engine.lookup(tokens, "r") == 256
    assert engine.retrieve(tokens, into, "r") == 256
    assert same(kv, into, 256)
    assert engine.plugin.report()["plugin"]["hits"]
    engine.close()


def refused(folder: Path) -> None:
    """A mistake is one line in LMCache's log, and the engine runs without us."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("lmcache.v1.storage_backend")
    logger.addHandler(handler)
    engine = Engine(STORAGE_WHOLE.config(folder / "refused", ["cpu://"], teirs="cpu://"), instance="refused")
    logger.removeHandler(handler)
    (line,) = [line for line in told if "Failed to create backend droidspeak" in line]
    assert "\n" not in line
    assert "storage_plugin.droidspeak.*: unknown configuration key 'teirs'; allowed: " in line, line
    assert "droidspeak" not in engine.backends
    tokens = tokens_of(256)
    engine.store(tokens, engine.kv(1))
    assert engine.lookup(tokens) == 0
    engine.close()


def run(folder: Path, files: list[Path]) -> dict[str, str]:
    cases = {file.name: lambda file=file: works(folder / file.stem, file) for file in files}
    cases["refused"] = lambda: refused(folder)
    report = {}
    for name, case in cases.items():
        (folder / Path(name).stem).mkdir(parents=True)
        try:
            case()
            report[name] = "ok"
        except Exception:  # noqa: BLE001 - it goes into the report
            report[name] = traceback.format_exc(limit=-4)
            Engine.close_all()
    return report


if __name__ == "__main__":
    print("REPORT " + json.dumps(run(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])), flush=True)
    cpu_engine.leave()
