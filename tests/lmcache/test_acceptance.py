"""LMCache's own acceptance tool, with our plug-ins configured."""

from __future__ import annotations

import re

import yaml

from .processes import run

OPERATIONS = {"EXISTS (non-exist)", "PUT", "EXISTS (exist)", "GET"}


def passes(output: str) -> dict[str, str]:
    """Rate of passes by operation, of the tool's last table."""
    rows = re.findall(r"^\| ([A-Z][^|]*?) +\|.*\| +([0-9.]+%) \|", output, flags=re.MULTILINE)
    return dict(rows)


def options(kind: str, class_name: str, folder) -> dict[str, object]:
    prefix = f"{kind}_plugin.droidspeak"
    module = {"storage": "storage", "remote_storage": "remote"}[kind]
    return {
        "chunk_size": 256,
        "local_cpu": False,
        "max_local_cpu_size": 0.1,
        f"{kind}_plugins": ["droidspeak"],
        "extra_config": {
            f"{prefix}.module_path": f"droidspeak.integrations.lmcache_plugin.{module}",
            f"{prefix}.class_name": class_name,
            f"{prefix}.tiers": [f"disk://{folder}?capacity=64MiB"],
        },
    }


def accepted(tmp_path, mode: str, config: dict[str, object]) -> None:
    path = tmp_path / "lmcache.yaml"
    path.write_text(yaml.safe_dump(config))
    done = run(
        "-m", "lmcache.v1.basic_check", "--mode", mode, "--num-keys", "8", LMCACHE_CONFIG_FILE=str(path)
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert passes(done.stdout) == dict.fromkeys(OPERATIONS, "100.0%"), told
    assert "Failed" not in told, told


def test_storage_manager(tmp_path):
    accepted(tmp_path, "test_storage_manager", options("storage", "DroidSpeakStorage", tmp_path / "store"))


def test_remote(tmp_path):
    config = options("remote_storage", "DroidSpeakConnectorAdapter", tmp_path / "store")
    # The tool makes LMCache's remote backend itself, from the URL.
    accepted(tmp_path, "test_remote", {**config, "remote_url": "plugin://droidspeak"})
