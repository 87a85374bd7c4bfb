"""What `droidspeak doctor` looks at: each check is `ok`, `warn` or `fail`, and says what to do.

machine()              Python, versions, extras, torch and its GPUs
configuration(...)     settings, policies
tiers(...)             each tier: opened and asked (written to, if asked for), room, clock
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from droidspeak import __version__
from droidspeak.config.settings import Settings, open_policies
from droidspeak.errors import DroidSpeakError, PolicyError
from droidspeak.integrations.cli.clocks import clock_of
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.tier import Tier
from droidspeak.storage.urls import checked_options, open_tier, tier_options

__all__ = ["Check", "Verdict", "machine", "policies", "tier_checks"]

T = TypeVar("T")
# Clocks further apart than this make ages and "older than" wrong; S3 refuses requests at 15 minutes.
_APART, _TOO_FAR_APART = 5.0, 600.0
_REQUIREMENT = re.compile(r"""([A-Za-z0-9._-]+).*;\s*extra\s*==\s*['"]([a-z0-9-]+)['"]""")
_GIB = 1 << 30


class Verdict(StrEnum):
    """What a check says."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `advice` says what to do, if anything is to be done."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def machine() -> Iterator[Check]:
    """Python, versions, extras, torch."""
    told = (
        f"Python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}"
    )
    yield Check("environment", Verdict.OK, f"{told}, {sys.prefix}")
    yield Check("droidspeak", Verdict.OK, __version__)
    yield from _extras()
    yield _torch()


def _extras() -> Iterator[Check]:
    for extra, packages in sorted(_packages_by_extra().items()):
        versions = {package: _version_of(package) for package in packages}
        there = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        if all(versions.values()):
            yield Check(f"extra {extra}", Verdict.OK, there)
        else:
            missing = ", ".join(package for package, version in versions.items() if not version)
            pip = f"if you want it: pip install 'droidspeak[{extra}]'"
            yield Check(f"extra {extra}", Verdict.OK, f"not installed: {missing}", pip)


def _packages_by_extra() -> dict[str, list[str]]:
    with suppress(importlib.metadata.PackageNotFoundError):
        found: dict[str, list[str]] = {}
        for requirement in importlib.metadata.requires("droidspeak") or ():
            if (match := _REQUIREMENT.match(requirement)) and match[2] != "dev":
                found.setdefault(match[2], []).append(match[1])
        return found
    return {}


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}, but no GPU answers" if torch.version.cuda else "CPU only"
        )
        verdict = Verdict.WARN if torch.version.cuda else Verdict.OK
        advice = "check the driver with nvidia-smi" if torch.version.cuda else ""
        return Check("torch", verdict, f"{torch.__version__}, {built}", advice)
    devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    named = ", ".join(f"{device.name} {device.total_memory / _GIB:.0f} GiB" for device in devices)
    return Check("torch", Verdict.OK, f"{torch.__version__}, CUDA {torch.version.cuda}: {named}")


def policies(settings: Settings) -> Iterator[Check]:
    """The policies folder: read, and the files in it that are refused."""
    if settings.policies is None:
        advice = "set policies to the folder of your policy files, if models are to share"
        yield Check("policies", Verdict.OK, "none: no model uses another one's cache", advice)
        return
    try:
        found = open_policies(settings)
    except PolicyError as error:
        yield Check("policies", Verdict.FAIL, str(error), "make the folder, or correct the setting policies")
        return
    yield Check("policies", Verdict.OK, f"{len(found)} of pairs in {settings.policies}")
    for refusal in found.refused:
        advice = "profile the pair again, or take the file away"
        yield Check(f"policy {refusal.path.name}", Verdict.WARN, refusal.reason, advice)


def tier_checks(description: str | Mapping[str, Any], *, write: bool) -> Iterator[Check]:
    """One configured tier: opened and asked, room, clock.

    Args:
        write: also writes, reads and deletes a small chunk. Nothing is changed without.
    """
    try:
        options = checked_options(description)
    except DroidSpeakError as error:
        yield Check("tier", Verdict.FAIL, str(error), "correct the setting tiers")
        return
    name = f"tier {options.get('name', options['type'])}"
    if options["type"] == "disk":
        there = (options["path"] / "catalog.sqlite").exists()
        yield from _folder(name, options, there=there or write)
        if not there and not write:
            return
    yield _asked(name, description, write=write)
    if options["type"] == "cpu":
        yield _memory(name, options.get("capacity", 4 << 30))
    if clock := clock_of(options):
        yield _clock(f"{name} clock", clock)


def _asked(name: str, description: str | Mapping[str, Any], *, write: bool) -> Check:
    options = tier_options(description)
    if options["type"] == "disk" and not write:
        options["read_only"] = True
    try:
        with open_tier(options) as tier:
            told = _round_trip(tier) if write else _timed("asked for a chunk", lambda: tier.head(_some_key()))
    except DroidSpeakError as error:
        return Check(name, Verdict.FAIL, str(error), _advice(options["type"]))
    return Check(name, Verdict.OK, told)


def _advice(kind: str) -> str:
    return {
        "disk": "check that the folder is mounted and belongs to this user",
        "gpu": "take the tier out, or install a torch that finds the GPU",
        "s3": "check endpoint, bucket and credentials (aws s3 ls)",
        "droidspeak": "check that the daemon runs (curl http://HOST:PORT/readyz) and that the token is its",
    }.get(kind, "correct the setting tiers")


def _some_key() -> ChunkKey:
    return ChunkKey(SourceId(secrets.token_hex(32)), "0of1", secrets.token_hex(32))


def _timed(what: str, call: Callable[[], object]) -> str:
    began = time.perf_counter()
    call()
    return f"{what} in {(time.perf_counter() - began) * 1e3:.1f} ms"


def _round_trip(tier: Tier) -> str:
    import torch

    from droidspeak.storage import Chunk, Slot, SlotKind

    rows = torch.arange(64, dtype=torch.float32).reshape(16, 2, 2)
    chunk = Chunk.encode(_some_key(), {Slot(kind, 0): rows for kind in (SlotKind.K, SlotKind.V)})
    try:
        wrote = _timed("wrote", lambda: tier.write(chunk))
        read = _timed("read", lambda: _read_back(tier, chunk.key))
    finally:
        deleted = _timed("deleted", lambda: tier.delete(chunk.key))
    return f"{wrote}, {read}, {deleted}"


def _read_back(tier: Tier, key: ChunkKey) -> None:
    if tier.read(key) is None:
        raise DroidSpeakError("a chunk that was just written is not there")


def _folder(name: str, options: Mapping[str, Any], *, there: bool) -> Iterator[Check]:
    """Room of a disk tier, in the folder or in the place where it will be made."""
    path: Path = options["path"]
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    if not options.get("read_only") and not os.access(place, os.W_OK):
        yield Check(name, Verdict.FAIL, f"{place} cannot be written", _advice("disk"))
    elif not there:
        yield Check(name, Verdict.OK, f"{path} holds no store yet; it is made at the first start")
    free = shutil.disk_usage(place).free
    floor, capacity = options.get("min_free", _GIB), options.get("capacity")
    told = f"{free / _GIB:.1f} GiB free in {place}"
    if free < floor:
        advice = f"make room: below {floor / _GIB:.1f} GiB (min_free) older chunks leave for each new one"
        yield Check(f"{name} room", Verdict.FAIL, told, advice)
    elif capacity and capacity - (_held(path) if there else 0) > free - floor:
        advice = f"lower capacity ({capacity / _GIB:.1f} GiB) or min_free, or make room"
        yield Check(f"{name} room", Verdict.WARN, f"{told}, less than the capacity still asks for", advice)
    else:
        yield Check(f"{name} room", Verdict.OK, told)


def _held(path: Path) -> int:
    with suppress(DroidSpeakError), open_tier({"type": "disk", "path": path, "read_only": True}) as tier:
        return tier.usage().nbytes
    return 0


def _memory(name: str, capacity: int) -> Check:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
        told = f"{capacity / _GIB:.1f} of {total / _GIB:.1f} GiB of memory"
        if capacity > total // 2:
            return Check(f"{name} room", Verdict.WARN, told, "lower capacity: the engine needs memory too")
        return Check(f"{name} room", Verdict.OK, told)
    return Check(
        f"{name} room", Verdict.OK, f"{capacity / _GIB:.1f} GiB; this system does not say of how much"
    )


def _clock(name: str, ahead: Callable[[], float]) -> Check:
    try:
        seconds = ahead()
    except (OSError, ValueError) as error:
        return Check(name, Verdict.WARN, f"not known: {error}", "")
    told = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} ours"
    if abs(seconds) <= _APART:
        return Check(name, Verdict.OK, told)
    verdict = Verdict.WARN if abs(seconds) <= _TOO_FAR_APART else Verdict.FAIL
    return Check(name, verdict, told, "set both clocks by NTP: ages, tokens and signatures depend on them")
