"""What lies in `deploy/`: it parses, and every flag, setting and path in it is one that there is."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from droidspeak.config import ServerSettings, Settings, load_settings
from droidspeak.integrations.cli.serve import serve

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "droidspeak.service"
TOKEN = "0123456789abcdef0123"


def flags() -> set[str]:
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    return {name for parameter in typer.main.get_command(app).params for name in parameter.opts}


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def compose() -> dict[str, Any]:
    text = re.sub(r"\$\{\w+:\?[^}]*\}", TOKEN, (DEPLOY / "compose.yaml").read_text())
    return yaml.safe_load(text)


def container() -> dict[str, str]:
    """The instructions of the container file that are there once."""
    joined = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    lines = [line.partition(" ") for line in joined.splitlines() if line and not line.startswith("#")]
    return {name: " ".join(rest.split()) for name, _, rest in lines}


def test_configuration_of_the_service(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DROIDSPEAK_")]:
        monkeypatch.delenv(name)
    settings = load_settings(DEPLOY / "droidspeak.yaml")
    assert settings.server.listen.loopback
    cache = f"/var/cache/{unit()['Service']['CacheDirectory']}/"
    assert any(cache in str(tier) for tier in settings.tiers)


def test_unit_calls_what_there_is():
    service = unit()["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "droidspeak"
    assert words[0] == "serve"
    assert {word for word in words if word.startswith("-")} <= flags()
    assert words[words.index("--config") + 1] == "/etc/droidspeak/droidspeak.yaml"
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > ServerSettings().drain_timeout + 30
    assert int(service["LimitNOFILE"]) > 2 * ServerSettings().max_connections


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    program = tmp_path / "droidspeak"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/droidspeak/bin/droidspeak", str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", copy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout


def test_container_calls_what_there_is():
    instructions = container()
    assert json.loads(instructions["ENTRYPOINT"]) == ["droidspeak", "serve"]
    assert json.loads(instructions["CMD"])[1] == str(ServerSettings().listen.port)
    assert f":{ServerSettings().http.port}/readyz" in instructions["HEALTHCHECK"]
    assert instructions["USER"] == "droidspeak"
    for name in re.findall(r"DROIDSPEAK_(\w+)=", instructions["ENV"]):
        assert name.lower() in Settings.model_fields


def test_container_is_made_of_files_that_there_are():
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text().split()
    assert {line[1:] for line in ignored if line.startswith("!")} == names


def test_compose_starts_a_daemon_that_others_cannot_enter(monkeypatch):
    daemon = compose()["services"]["droidspeak"]
    for name, value in daemon["environment"].items():
        monkeypatch.setenv(name, value)
    host, port, flag, http = daemon["command"]
    assert flag in flags()
    settings = load_settings(overrides={"server": {"listen": f"{host}:{port}", "http": http}})
    (token,) = settings.server.tokens
    assert token.token is not None
    assert (token.token.get_secret_value(), token.scopes) == (TOKEN, ("read",))
    assert all(published.startswith("127.0.0.1:") for published in daemon["ports"])
    assert daemon["build"] == {"context": "..", "dockerfile": "deploy/Containerfile"}


def test_compose_refuses_to_start_without_a_token():
    assert "${DROIDSPEAK_METRICS_TOKEN:?" in (DEPLOY / "compose.yaml").read_text()


def test_prometheus_scrapes_that_daemon():
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    services, secrets = compose()["services"], compose()["secrets"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert services[name]["command"][-1].endswith(f":{port}")
    secret = Path(job["authorization"]["credentials_file"]).name
    assert secret in services["prometheus"]["secrets"]
    assert secrets[secret] == {"environment": "DROIDSPEAK_METRICS_TOKEN"}
    mounted = [volume.split(":")[0] for volume in services["prometheus"]["volumes"]]
    assert [(DEPLOY / place).exists() for place in mounted if place.startswith(".")] == [True]


def test_page_names_every_flag_and_bound():
    page = (ROOT / "docs" / "server.md").read_text()
    assert {f for f in flags() if f.startswith("--") and f not in page} == set()
    named = set(re.findall(r"`server\.(\w+)`", page))
    assert named <= set(ServerSettings.model_fields)
    bounds = {name for name in ServerSettings.model_fields if name.startswith(("max_", "in_"))}
    bounds |= {name for name in ServerSettings.model_fields if name.endswith("_timeout")}
    assert bounds <= named
    for path in re.findall(r"deploy/[\w.]+", page):
        assert (ROOT / path).exists()
