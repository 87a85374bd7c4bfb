"""Shell completion, and what every command's help says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from droidspeak.integrations.cli.main import _COMMANDS

from .commandline import call

PROGRAM = shutil.which("droidspeak", path=os.path.dirname(sys.executable))


def complete(shell: str, line: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """What `shell` is offered for the last word of `line`."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
    }[shell]
    environment = {**os.environ, **asked, "_DROIDSPEAK_COMPLETE": f"complete_{shell}"}
    command = [sys.executable, *flags, "-m", "droidspeak"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("droidspeak ", sorted(_COMMANDS)),
        ("droidspeak st", ["store"]),
        ("droidspeak store l", ["ls"]),
        ("droidspeak config ", ["check", "schema", "show"]),
        ("droidspeak config show --s", ["--sources"]),
        ("droidspeak nothing", []),
    ],
)
def test_bash(line, words):
    told = complete("bash", line).stdout.split()
    assert sorted(told) == sorted(words)


@pytest.mark.parametrize(("line", "words"), [("droidspeak store l", ["ls"]), ("droidspeak doc", ["doctor"])])
def test_zsh(line, words):
    told = complete("zsh", line).stdout
    assert told.startswith("_arguments '*: :((")
    assert re.findall(r'\("([\w-]+)"', told) == words


def test_completing_a_name_imports_no_command():
    told = complete("bash", "droidspeak po", "-X", "importtime")
    assert told.stdout.split() == ["policy"]
    assert not re.search(r"\b(torch|transformers|numpy|fastapi)$", told.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("shell", "says"), [("bash", "complete -o default -F"), ("zsh", "#compdef droidspeak")]
)
def test_the_functions_that_a_shell_sources(shell, says):
    environment = {**os.environ, "_DROIDSPEAK_COMPLETE": f"source_{shell}"}
    told = subprocess.run(
        [sys.executable, "-m", "droidspeak"], env=environment, capture_output=True, text=True, check=True
    )
    assert says in told.stdout
    assert "_DROIDSPEAK_COMPLETE=complete_" in told.stdout


@pytest.mark.skipif(
    PROGRAM is None or shutil.which("bash") is None, reason="needs bash and the installed program"
)
def test_a_real_bash_completes():
    script = f"""
        eval "$(_DROIDSPEAK_COMPLETE=source_bash {PROGRAM})"
        COMP_WORDS=(droidspeak store l); COMP_CWORD=2
        _droidspeak_completion {PROGRAM}
        echo "${{COMPREPLY[@]}}"
    """
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "ls"


def commands() -> list[tuple[str, ...]]:
    flat: list[tuple[str, ...]] = [()]
    for name, place in _COMMANDS.items():
        flat += [(name,), *((name, part) for part in (place if isinstance(place, dict) else ()))]
    return [*flat, ("policy", "show")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_help_lists_the_exit_statuses(command):
    told = call(*command, "--help")
    assert told.returncode == 0
    said = " ".join(told.stdout.split())
    assert said.startswith(f"Usage: {' '.join(('droidspeak', *command))}")
    for status in ("0 done", "1 failed", "2 the call was wrong", "3 something was found", "130 interrupted"):
        assert status in said
