"""`droidspeak serve`, and `lmcache_server`, which is the same with LMCache's own arguments."""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from droidspeak.config import Address, Settings, load_settings
from droidspeak.errors import UsageError
from droidspeak.integrations.cli.output import note
from droidspeak.integrations.server.daemon import Daemon
from droidspeak.integrations.server.notify import sd_notify
from droidspeak.telemetry.logs import start_logging

__all__ = ["serve"]

_STOP = (signal.SIGTERM, signal.SIGINT)


def serve(
    host: Annotated[str | None, typer.Argument(help="Where lm:// clients connect.")] = None,
    port: Annotated[int | None, typer.Argument(help="0 takes a free port.", min=0, max=65535)] = None,
    device: Annotated[str, typer.Argument(help="As LMCache's server has it: only cpu.")] = "cpu",
    tier: Annotated[
        list[str] | None, typer.Option(help="URL of a tier, from fast to slow; can be repeated.")
    ] = None,
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT of the HTTP side.", show_default="127.0.0.1:65433")
    ] = None,
    no_http: Annotated[bool, typer.Option("--no-http", help="No HTTP side.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as server.idle_timeout=600."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line.")] = "text",
) -> None:
    """Serve LMCache's lm:// protocol, and HTTP, from our tiers.

    Prints `READY lm=HOST:PORT http=HOST:PORT` when it serves. SIGTERM drains and flushes; a second one ends
    at once.
    """
    start_logging(log_level, log_format)
    if device != "cpu":
        raise UsageError(f"device {device!r}; allowed: cpu. Tiers are set by --tier")
    listen = load_settings(config).server.listen
    listen = Address(host=host or listen.host, port=listen.port if port is None else port)
    settings = load_settings(config, _overrides(listen, tier, http, set_ or []))
    if no_http:
        settings = settings.model_copy(update={"server": settings.server.model_copy(update={"http": None})})
    _run(settings)


def _run(settings: Settings) -> None:
    # Before there are threads, which inherit it: a signal waits until it is waited for, and none is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    with Daemon(settings) as daemon:
        places = " ".join(f"{name}={address}" for name, address in daemon.addresses.items())
        print(f"READY {places}", flush=True)
        sd_notify("READY=1")
        _warn_of_open_doors(settings)
        # What has been loaded stays: collections need not walk it again and again.
        gc.freeze()
        signal.sigwait(_STOP)
        _let_signals_end_the_process()
        sd_notify("STOPPING=1")
        note("stopping: requests end, then what waits is written; again to stop at once")


def _let_signals_end_the_process() -> None:
    for number in _STOP:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)


def _warn_of_open_doors(settings: Settings) -> None:
    server = settings.server
    listening = [server.listen, *(tenant.listen for tenant in server.tenants.values() if tenant.listen)]
    for address in listening:
        if not address.loopback and not (server.tls and server.tls.client_ca):
            note(f"warning: whoever reaches {address} can read and write: lm:// knows no passwords")


def _overrides(
    listen: Address, tiers: list[str] | None, http: str | None, assignments: list[str]
) -> dict[str, Any]:
    """The flags as settings; what the configuration says besides is merged with them."""
    overrides: dict[str, Any] = {"server": {"listen": str(listen)}}
    if tiers:
        overrides["tiers"] = tuple(tiers)
    if http is not None:
        overrides["server"]["http"] = http
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: allowed is KEY=VALUE")
        _put(overrides, key, yaml.safe_load(value))
    return overrides


def _put(sections: dict[str, Any], key: str, value: Any) -> None:
    """`value` at `key`, which names a place as `a.b.c`."""
    *path, last = key.split(".")
    for part in path:
        sections = sections.setdefault(part, {})
        if not isinstance(sections, dict):
            raise UsageError(f"--set {key}: {part} is no section")
    sections[last] = value
