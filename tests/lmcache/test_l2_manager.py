"""The L2 adapter under LMCache's StorageManager, in processes that end well or are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("l2_manager_process.py")


def adapter_json(**params):
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "droidspeak.integrations.lmcache_plugin.l2",
            "class_name": "DroidSpeakL2Adapter",
            "config_class_name": "DroidSpeakL2AdapterConfig",
            "adapter_params": params,
        }
    )


def environment():
    wanted = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "ERROR"}
    return {**os.environ, **wanted, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Manager:
    """The other process."""

    def __init__(self, **params):
        command = [sys.executable, str(SCRIPT), adapter_json(**params)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert self._answer() == {"ready": True}

    def __call__(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the process ended with {self.process.wait(10)}")

    def end(self):
        self.process.stdin.close()
        assert self._answer() == {"closed": True}
        assert self.process.wait(30) == 0

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


def chunk_file(root, manager, number):
    """The file of one object."""
    (prefix,) = manager("chunks", number, 1)["chunks"]
    (path,) = root.rglob(f"{prefix}.safetensors")
    return path


def all_from_l2(count):
    return {"bits": [True] * count, "from_l2": count, "exact": True}


def cut_after(count, of):
    return {"bits": [n < count for n in range(of)], "from_l2": count, "exact": True}


def test_prefixes_survive_a_kill_and_a_restart_and_are_cut_where_they_are_damaged(tmp_path):
    tiers = [f"disk://{tmp_path}"]
    with Manager(tiers=tiers) as manager:
        assert manager("store", 0, 4) == {"stored": 4}
        assert manager("clear") == {"l1": 0}
        assert manager("fetch", 0, 4) == all_from_l2(4)
        assert manager("store", 100, 3, "salt-a") == {"stored": 3}
        manager("clear")
        assert manager("fetch", 100, 3, "salt-a") == all_from_l2(3)
        assert manager("fetch", 100, 3, "salt-b") == cut_after(0, 3)
        assert manager("fetch", 100, 3) == cut_after(0, 3)
        status = manager("status")
        assert status["is_healthy"] is status["manager_is_healthy"] is True
        assert status["locks"] == 0
        manager.kill()
    for path in tmp_path.rglob("*"):
        assert "salt-a" not in str(path)
        assert path.is_dir() or b"salt-a" not in path.read_bytes()

    with Manager(tiers=["cpu://?capacity=1MiB", *tiers]) as manager:
        assert manager("fetch", 0, 4) == all_from_l2(4)
        assert manager("fetch", 100, 3, "salt-a") == all_from_l2(3)
        assert manager("store", 200, 4)["stored"] == 4
        assert manager("store", 300, 4)["stored"] == 4
        assert manager("store", 400, 4)["stored"] == 4
        flipped, short, gone = (chunk_file(tmp_path, manager, n) for n in (202, 301, 403))
        manager("clear")
        manager.end()

    data = bytearray(flipped.read_bytes())
    data[-5] ^= 0x10
    flipped.write_bytes(data)
    os.truncate(short, short.stat().st_size // 2)
    gone.unlink()
    with Manager(tiers=tiers) as manager:
        assert manager("fetch", 200, 4) == cut_after(2, 4)
        assert manager("fetch", 300, 4) == cut_after(1, 4)
        assert manager("fetch", 400, 4) == cut_after(3, 4)
        failures = manager("status")["counters"]["load_failed"]
        assert failures == {"corrupt": 2, "missing": 1}
        # What was lost is computed and stored again.
        assert manager("store", 202, 1) == {"stored": 1}
        manager("clear")
        assert manager("fetch", 200, 4) == all_from_l2(4)
        manager.end()
