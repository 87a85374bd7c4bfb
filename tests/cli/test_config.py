"""`droidspeak config`: what is shown is what holds, and where it comes from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from droidspeak.config import Settings
from droidspeak.config.masking import HIDDEN
from droidspeak.config.schema import settings_schema

from .commandline import call

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef-secret"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("DROIDSPEAK_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "droidspeak.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "codec": "zstd",
                "chunk_size": 64,
                "tiers": [{"type": "droidspeak", "host": "cache", "token": SECRET}],
                "limits": {"droidspeak": {"read_deadline": 2}},
                "server": {"tokens": [{"name": "one", "token": SECRET}]},
            }
        )
    )
    return path


def settings(*arguments: object) -> dict[str, dict]:
    told = call("config", "show", "--format", "json", *arguments)
    assert (told.returncode, told.stderr) == (0, "")
    document = json.loads(told.stdout)
    assert document["version"] == 1
    return {row["key"]: row for row in document["settings"]}


def test_each_value_has_its_source(file, monkeypatch):
    monkeypatch.setenv("DROIDSPEAK_CONFIG", str(file))
    monkeypatch.setenv("DROIDSPEAK_CHUNK_SIZE", "128")
    monkeypatch.setenv("DROIDSPEAK_SERVER__LISTEN", "127.0.0.1:7000")
    monkeypatch.setenv("DROIDSPEAK_DRIFT", '{"window": 32}')
    found = settings()
    expected = {
        "codec": ("zstd", f"file {file}"),
        "chunk_size": (128, "environment DROIDSPEAK_CHUNK_SIZE"),
        "server.listen": ("127.0.0.1:7000", "environment DROIDSPEAK_SERVER__LISTEN"),
        "server.http": ("127.0.0.1:65433", "default"),
        "drift.window": (32, "environment DROIDSPEAK_DRIFT"),
        "drift.least": (8, "default"),
        "limits.droidspeak.read_deadline": (2.0, f"file {file}"),
        "limits.droidspeak.write_deadline": (60.0, "default"),
        "loaders": (2, "default"),
    }
    assert {key: (found[key]["value"], found[key]["source"]) for key in expected} == expected
    assert {key.partition(".")[0] for key in found} == set(Settings.model_fields)


def test_a_file_that_is_named_wins_over_the_environments(file, tmp_path, monkeypatch):
    other = tmp_path / "other.yaml"
    other.write_text("codec: raw\n")
    monkeypatch.setenv("DROIDSPEAK_CONFIG", str(other))
    assert settings("--config", file)["codec"]["source"] == f"file {file}"


@pytest.mark.parametrize("format", ["table", "json", "jsonl"])
def test_no_secret_is_shown(file, format, monkeypatch):
    monkeypatch.setenv("DROIDSPEAK_SALT", SECRET)
    told = call("config", "show", "--sources", "--config", file, "--format", format)
    assert told.returncode == 0
    assert SECRET not in told.stdout + told.stderr
    assert told.stdout.count(HIDDEN) == 3


def test_sources_are_a_column_when_asked_for(file):
    without, with_ = (call("config", "show", "--config", file, *more).stdout for more in ([], ["--sources"]))
    assert "source" not in without.splitlines()[0]
    assert with_.splitlines()[0].split() == ["setting", "value", "source"]
    assert call("config", "show", "--format", "quiet").stdout.splitlines()[0] == "tiers"


def test_check(file, monkeypatch):
    told = call("config", "check", file)
    assert (told.returncode, told.stdout, told.stderr) == (0, f"{file}: ok\n", "")
    monkeypatch.setenv("DROIDSPEAK_CONFIG", str(file))
    told = call("config", "check", "--format", "json")
    assert json.loads(told.stdout) == {"version": 1, "ok": True, "file": str(file)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("codec: gzip", "allowed: raw, zstd"),
        ("chunk_sise: 16", "unknown configuration key 'chunk_sise'; allowed: "),
        ("tiers: ['disk:///x?capacity=1parsec']", "1parsec"),
        ("tiers: ['ftp://x']", "unknown tier 'ftp'"),
        ("server: {tenants: {acme: {tiers: ['disk://x']}}}", "relative path"),
        ("[", "not YAML"),
        ("- 1", "must be a mapping"),
    ],
)
def test_check_finds_what_is_wrong(tmp_path, content, says):
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    told = call("config", "check", file)
    assert (told.returncode, told.stdout) == (2, "")
    assert says in told.stderr
    assert told.stderr.count("\n") == 1
    assert not list(tmp_path.glob("x*"))


def test_check_without_a_file_there(tmp_path):
    told = call("config", "check", tmp_path / "none.yaml")
    assert (told.returncode, told.stdout) == (2, "")
    assert "No such file" in told.stderr


def test_the_schema_is_the_committed_one():
    told = call("config", "schema")
    assert told.returncode == 0
    assert json.loads(told.stdout) == settings_schema()
    committed = ROOT / "docs" / "schemas" / "config.schema.json"
    assert committed.read_text() == told.stdout, "droidspeak config schema > docs/schemas/config.schema.json"


def test_the_schema_takes_what_the_page_shows_and_nothing_unknown():
    validator = jsonschema.Draft202012Validator(settings_schema())
    page = (ROOT / "docs" / "configuration.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    example = yaml.safe_load(page.replace("<hex of the token's SHA-256>", "a" * 64))
    deployed = yaml.safe_load((ROOT / "deploy" / "droidspeak.yaml").read_text())
    for sound in (example, deployed, {}):
        assert list(validator.iter_errors(sound)) == []
    for wrong in ({"chunk_sise": 1}, {"server": {"liste": "x"}}, {"loaders": 0}, {"tiers": []}):
        assert list(validator.iter_errors(wrong)) != []
