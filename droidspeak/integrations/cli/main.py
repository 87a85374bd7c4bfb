"""The `droidspeak` command.

Exit status: 0 done, 1 failed, 2 the call was wrong, 130 interrupted. Results go to standard output,
everything else to standard error.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from droidspeak import __version__
from droidspeak.errors import DroidSpeakError, IdentityError, UsageError
from droidspeak.integrations.cli import demo, policy, profile, serve
from droidspeak.integrations.cli.output import note

app = typer.Typer(
    name="droidspeak",
    help="Share KV caches between fine-tuned variants of one model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo.demo)
app.command()(profile.profile)
app.command()(serve.serve)
app.add_typer(policy.app)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Share KV caches between fine-tuned variants of one model (arXiv 2411.02820)."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except typer.TyperException as error:
        note(f"error: {error.format_message()}")
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
