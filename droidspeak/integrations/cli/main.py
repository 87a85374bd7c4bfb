"""The `droidspeak` command.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from droidspeak import __version__
from droidspeak.errors import (
    Declined,
    DroidSpeakError,
    IdentityError,
    NotFound,
    TierTimeout,
    TierUnavailable,
    UsageError,
)
from droidspeak.integrations.cli.output import ReaderGone, note

# Where each command is. Only what a call needs is imported: torch and transformers take seconds, and memory
# that a daemon keeps for good.
_Place = str | dict[str, str]
_COMMANDS: dict[str, _Place] = {
    "config": {"check": "config:check", "schema": "config:schema", "show": "config:show"},
    "demo": "demo:demo",
    "doctor": "doctor:doctor",
    "policy": "policy:app",
    "profile": "profile:profile",
    "serve": "serve:serve",
    "store": {
        "copy": "store.copy:copy",
        "df": "store.df:df",
        "export": "store.archive:export",
        "import": "store.archive:import_",
        "ls": "store.ls:ls",
        "pin": "store.each:pin",
        "prune": "store.prune:prune",
        "purge": "store.prune:purge",
        "rm": "store.each:rm",
        "shared": "store.shared:shared",
        "show": "store.show:show",
        "stats": "store.stats:stats",
        "top": "store.ls:top",
        "unpin": "store.each:unpin",
        "verify": "store.verify:verify",
    },
    "vllm-args": "vllm_args:vllm_args",
}
_GROUPS: dict[str, str] = {
    "config": "Show, check and describe the configuration.",
    "store": "Look after what tiers hold.",
}
_NAME = "droidspeak"
# Set by the shell's completion function.
_COMPLETE = "_DROIDSPEAK_COMPLETE"
_STATUSES = (
    "Exit status: 0 done, 1 failed, 2 the call was wrong, 3 something was found, 4 not there, 5 cannot be"
    " reached, 6 declined, 130 interrupted."
)
_INTERRUPTED = 130
_FAILURES: tuple[tuple[type[DroidSpeakError], int], ...] = (
    (UsageError, 2),
    (IdentityError, 2),
    (NotFound, 4),
    (TierUnavailable, 5),
    (TierTimeout, 5),
    (Declined, 6),
    (DroidSpeakError, 1),
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Share KV caches between fine-tuned variants of one model (arXiv 2411.02820)."""


def _app(arguments: list[str]) -> typer.Typer:
    """The command line with the command that `arguments` call; if they call none, what each is for."""
    app = _group("Share KV caches between fine-tuned variants of one model.", name=_NAME)
    app.callback(epilog=_STATUSES)(_options)
    for name, place in _called(_COMMANDS, arguments).items():
        _add(app, name, place, arguments)
    return app


def _called(places: Mapping[str, _Place], words: list[str]) -> Mapping[str, _Place]:
    """The one of `places` that `words` begin with, else all: reading what they are for takes its time."""
    return {words[0]: places[words[0]]} if words and words[0] in places else places


def _group(help: str, name: str | None = None) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=help,
        epilog=_STATUSES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def _add(app: typer.Typer, name: str, place: _Place, words: list[str]) -> None:
    if isinstance(place, dict):
        group = _group(_GROUPS[name])
        for part, inner in _called(place, words[1:]).items() if words[:1] == [name] else ():
            _add(group, part, inner, words[1:])
        app.add_typer(group, name=name)
    elif words[:1] == [name]:
        _add_called(app, name, *place.split(":"))
    else:
        app.command(name, help=_purpose(*place.split(":")))(lambda: None)


def _purpose(module: str, attribute: str) -> str:
    """What a command or a group says of itself, without an import of it."""
    source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == attribute:
            told = {keyword.arg: keyword.value for keyword in getattr(node.value, "keywords", ())}
            return str(ast.literal_eval(told["help"]))
    raise AssertionError(f"no {attribute} in {module}")


def _add_called(app: typer.Typer, name: str, module: str, attribute: str) -> None:
    command = getattr(importlib.import_module(f"droidspeak.integrations.cli.{module}"), attribute)
    if isinstance(command, typer.Typer):
        for registered in command.registered_commands:
            registered.epilog = _STATUSES
        command.info.epilog = _STATUSES
        app.add_typer(command)
    else:
        app.command(name, epilog=_STATUSES)(command)


def _app_for(words: list[str]) -> typer.Typer:
    """The command line for a call, or for the line that a shell asks to complete."""
    if _COMPLETE not in os.environ:
        return _app(words)
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return _app(line.split()[1:])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        status = _app_for(words)(words, standalone_mode=False, prog_name=_NAME)
        if status == _INTERRUPTED:  # typer has turned Ctrl-C into it
            raise KeyboardInterrupt
        sys.exit(status)
    except typer.TyperException as error:
        told = error.format_message()
        # A group that is called without a command answers with its help.
        note(told if told.startswith("Usage:") else f"error: {' '.join(told.split())}")
        sys.exit(error.exit_code)
    except DroidSpeakError as error:
        note(f"error: {error}")
        sys.exit(next(status for kind, status in _FAILURES if isinstance(error, kind)))
    except (typer.Abort, KeyboardInterrupt):
        note("interrupted")
        sys.exit(_INTERRUPTED)
    except (BrokenPipeError, ReaderGone):
        # Python's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def server() -> None:
    """`lmcache_server` and `droidspeak-server`: `droidspeak serve` under the name that LMCache's has."""
    main(["serve", *sys.argv[1:]])
