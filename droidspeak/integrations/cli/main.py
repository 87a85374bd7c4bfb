"""The `droidspeak` command.

Exit status: 0 done, 1 failed, 2 the call was wrong, 130 interrupted. Results go to standard output,
everything else to standard error.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from droidspeak import __version__
from droidspeak.errors import DroidSpeakError, IdentityError, UsageError
from droidspeak.integrations.cli.output import note

# Where each command is. Only what a call needs is imported: transformers alone takes seconds, and memory
# that a daemon keeps for good.
_COMMANDS = {
    "demo": "demo:demo",
    "policy": "policy:app",
    "profile": "profile:profile",
    "serve": "serve:serve",
    "vllm-args": "vllm_args:vllm_args",
}


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
    app = typer.Typer(
        name="droidspeak",
        help="Share KV caches between fine-tuned variants of one model.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name in [called] if called in _COMMANDS else _COMMANDS:
        module, _, attribute = _COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(f"droidspeak.integrations.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name)(command)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(_app(words)(words, standalone_mode=False))
    except typer.TyperException as error:
        note(f"error: {' '.join(error.format_message().split())}")
        sys.exit(error.exit_code)
    except (UsageError, IdentityError) as error:
        note(f"error: {error}")
        sys.exit(2)
    except DroidSpeakError as error:
        note(f"error: {error}")
        sys.exit(1)
    except (typer.Abort, KeyboardInterrupt):
        note("interrupted")
        sys.exit(130)


def server() -> None:
    """`lmcache_server` and `droidspeak-server`: `droidspeak serve` under the name that LMCache's has."""
    main(["serve", *sys.argv[1:]])
