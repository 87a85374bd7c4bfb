"""`droidspeak vllm-args`: the flags that make a vLLM server a sender, a receiver, or both."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from droidspeak.integrations.cli.output import Format, FormatOption, note, show_document
from droidspeak.integrations.vllm_connector.arguments import EngineArguments, Role, engine_arguments
from droidspeak.storage import SourceManifest

__all__ = ["vllm_args"]


def vllm_args(
    role: Annotated[Role, typer.Option(help="A sender saves what it prefills, a receiver loads.")],
    model: Annotated[
        Path | None, typer.Option(help="Its folder: tells which hidden states to capture, and the dtype.")
    ] = None,
    policies: Annotated[Path | None, typer.Option(help="Folder of policy files.")] = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="URL of a tier, from fast to slow; can be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file, for all other settings.")] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens per chunk; all that share must agree.")
    ] = None,
    load: Annotated[
        Literal["sync", "async"] | None, typer.Option(help="Load within engine steps, or between them.")
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Print flags for `vllm serve` or `python -m vllm.entrypoints.openai.api_server`, quoted for a shell.

    droidspeak vllm-args --role both | xargs python -m vllm.entrypoints.openai.api_server --model FOLDER
    """
    manifest = None if model is None else SourceManifest.from_folder(model)
    extra = _extra(policies=policies, tier=tier, config=config, chunk_size=chunk_size, load=load)
    arguments = engine_arguments(role, extra, manifest)
    show_document(format, _content(arguments), lambda: print(shlex.join(arguments.flags)))
    _remark(arguments, model)


def _extra(
    *,
    policies: Path | None,
    tier: list[str] | None,
    config: Path | None,
    chunk_size: int | None,
    load: str | None,
) -> dict[str, Any]:
    """The connector's options; the server may be started in another folder, so paths are whole."""
    given = {
        "config": config and str(config.absolute()),
        "tiers": tier or None,
        "chunk_size": chunk_size,
        "policies": policies and str(policies.absolute()),
        "vllm": load and {"load": load},
    }
    return {key: value for key, value in given.items() if value is not None}


def _content(arguments: EngineArguments) -> dict[str, Any]:
    return {
        "version": 1,
        "flags": arguments.flags,
        "kv_transfer_config": arguments.kv_transfer_config,
        "speculative_config": arguments.speculative_config,
        "dtype": arguments.dtype,
    }


def _remark(arguments: EngineArguments, model: Path | None) -> None:
    """What a caller may not have meant, on standard error."""
    role = arguments.role
    if model is None:
        note("no --model: no hidden states are captured, and vLLM chooses the dtype")
        return
    if role.sends and not arguments.e_layers:
        note(f"no policy needs hidden states of {model}: only K and V are saved")
    if role.receives and not arguments.senders:
        note(f"no policy lets {model} use another model's cache: it loads its own only")
