"""The `droidspeak` command.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

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
from droidspeak.integrations.cli.output import note

# Where each command is. Only what a call needs is imported: torch and transformers take seconds, and memory
# that a daemon keeps for good.
_COMMANDS: dict[str, str | dict[str, str]] = {
    "demo": "demo:demo",
    "policy": "policy:app",
    "profile": "profile:profile",
    "serve": "serve:serve",
    "vllm-args": "vllm_args:vllm_args",
}
_GROUPS: dict[str, str] = {}
_STATUSES = (
    "Exit status: 0 done, 1 failed, 2 the call was wrong, 3 something was found, 4 not there, 5 cannot be"
    " reached, 6 declined, 130 interrupted."
)
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
    """The command line with the command that `arguments` call, or with all if they call none."""
    app = _group("Share KV caches between fine-tuned variants of one model.", name="droidspeak")
    app.callback(epilog=_STATUSES)(_options)
    words = [word for word in arguments if not word.startswith("-")]
    for name in _called(words, _COMMANDS):
        _add(app, name, _COMMANDS[name], words[1:])
    return app


def _group(help: str, name: str | None = None) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=help,
        epilog=_STATUSES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def _called(words: list[str], commands: dict[str, Any]) -> list[str]:
    return [words[0]] if words and words[0] in commands else list(commands)


def _add(app: typer.Typer, name: str, place: str | dict[str, str], words: list[str]) -> None:
    if isinstance(place, dict):
        group = _group(_GROUPS[name])
        for part in _called(words, place):
            _add(group, part, place[part], [])
        app.add_typer(group, name=name)
        return
    module, _, attribute = place.partition(":")
    command = getattr(importlib.import_module(f"droidspeak.integrations.cli.{module}"), attribute)
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command(name, epilog=_STATUSES)(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(_app(words)(words, standalone_mode=False))
    except typer.TyperException as error:
        note(f"error: {' '.join(error.format_message().split())}")
        sys.exit(error.exit_code)
    except DroidSpeakError as error:
        note(f"error: {error}")
        sys.exit(next(status for kind, status in _FAILURES if isinstance(error, kind)))
    except (typer.Abort, KeyboardInterrupt):
        note("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the results has seen enough (`| head`); Python's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def server() -> None:
    """`lmcache_server` and `droidspeak-server`: `droidspeak serve` under the name that LMCache's has."""
    main(["serve", *sys.argv[1:]])
