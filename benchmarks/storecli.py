"""`droidspeak store` over a folder of a million chunks: real processes, from their start.

`python -m benchmarks.storecli` writes its section of docs/benchmarks/store.md.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Series, machine, put_section, table
from droidspeak.storage.catalog import Catalog
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.eviction import Entry
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.tier import ChunkInfo, SlotBytes

HEADING = "# The store's command line"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "store.md"
TITLE = "## A million chunks"
_CHUNKS, _SOURCES = 1_000_000, 12
_ROUNDS, _LONG_ROUNDS = 15, 3
_KV_BYTES, _E_BYTES, _HEADER_BYTES = 16 << 20, 2 << 20, 8 << 10


@dataclass(frozen=True)
class _Call:
    """A command.

    Attributes:
        limit: seconds, of the issue; `None` if it sets none.
        first_row: only until the first row is there.
        place: how it is told of the store. Here and in `environment` stand the fields of `_Places`.
    """

    words: str
    limit: float | None = None
    first_row: bool = False
    rounds: int = _ROUNDS
    place: str = "--store {store}"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Places:
    """URL of the store, URL of one that is empty, and a configuration file that has the first one."""

    store: str
    empty: str
    config: str


@dataclass
class _Measured:
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


_CALLS = {
    "ls, first row": _Call("ls", 0.3, first_row=True),
    "ls --config FILE, first row": _Call("ls", 0.3, first_row=True, place="--config {config}"),
    "DROIDSPEAK_TIERS=... ls, first row": _Call(
        "ls", 0.3, first_row=True, place="", environment={"DROIDSPEAK_TIERS": "cpu:// {store}"}
    ),
    "ls --limit 20": _Call("ls --limit 20"),
    "ls --sort size:desc --limit 20": _Call("ls --sort size:desc --limit 20"),
    "ls --filter 'size>30MiB' --filter e=2": _Call("ls --filter size>30MiB --filter e=2 --limit 20"),
    "top --by hits": _Call("top --by hits"),
    "df": _Call("df", 2.0),
    "df -v": _Call("df -v", 3.0),
    "ls, all rows": _Call("ls", rounds=_LONG_ROUNDS),
    "ls --format jsonl, all rows": _Call("ls --format jsonl", rounds=_LONG_ROUNDS),
    "ls --sort size:desc, all rows": _Call("ls --sort size:desc", rounds=_LONG_ROUNDS),
    "copy --dry-run": _Call("copy --dry-run", rounds=_LONG_ROUNDS, place="{store} {empty}"),
}
_MOST_MEMORY = 200 << 20
_INTRO = f"""\
{_CHUNKS:,} rows of {_SOURCES} models in a catalog of {{nbytes}} MiB ({{filled:.0f}} s to make), no payload
files; page cache warm. Each figure is of a process from its start to its end, or to its first row on a
pipe; calls in turn, {_ROUNDS} rounds ({_LONG_ROUNDS} of those of all rows, which go to /dev/null, and of
`copy`, into an empty store). Where nothing else is said the store is named with `--store`; `FILE` and
`DROIDSPEAK_TIERS` configure it behind a memory tier. Load average of the machine before: {{load:.1f}}. Memory
is the most of all rounds; allowed are {_MOST_MEMORY >> 20} MiB.
"""


def _infos() -> Iterator[ChunkInfo]:
    """Chunks of two sizes, of a few models, by key."""
    links = sorted(hashlib.sha256(f"link {n}".encode()).hexdigest() for n in range(_CHUNKS // _SOURCES + 1))
    sources = sorted(hashlib.sha256(f"model {n}".encode()).hexdigest() for n in range(_SOURCES))
    for number in range(_CHUNKS):
        source, link = divmod(number, len(links))
        key = ChunkKey(SourceId(sources[source]), "0of1", links[link])
        slots = SlotBytes(_KV_BYTES, _KV_BYTES, _E_BYTES * (number % 3 == 0))
        e_layers = (2,) if slots.e else ()
        yield ChunkInfo(key, 256, sum(slots) + _HEADER_BYTES, e_layers, "raw", None, "", slots)


def _fill(root: Path) -> None:
    """A catalog without files: they are not what listings read."""
    (root / "chunks").mkdir(parents=True)
    catalog = Catalog(root / "catalog.sqlite")
    with catalog.transaction():
        for number, info in enumerate(_infos()):
            catalog.put(Entry(info.key, info.nbytes, hits=number * 7919 % 1000, pinned=number % 100 == 0))
            catalog.describe(info, _HEADER_BYTES, time.time_ns())
    catalog.close()


def _places(root: Path) -> _Places:
    """The store in `root`, and the other places in it, made."""
    DiskTier(root / "empty", min_free=0).close()
    places = _Places(f"disk://{root}/store", f"disk://{root}/empty?min_free=0", str(root / "config.yaml"))
    (root / "config.yaml").write_text(f"tiers:\n  - cpu://?capacity=1GiB\n  - {places.store}\n")
    return places


def _run(call: _Call, places: _Places, measured: _Measured) -> None:
    words = f"{call.words} {call.place}".format(**vars(places)).split()
    command = [sys.executable, "-m", "droidspeak", "store", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DROIDSPEAK_")}
    environment |= {name: value.format(**vars(places)) for name, value in call.environment.items()}
    with open(os.devnull, "wb") as nothing:
        output = subprocess.PIPE if call.first_row else nothing
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, env=environment)
        if process.stdout:
            # The first line has the titles.
            assert process.stdout.readline()
            assert process.stdout.readline()
            measured.seconds.append(time.perf_counter() - started)
            process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    if not call.first_row:
        measured.seconds.append(time.perf_counter() - started)
    measured.peak = max(measured.peak, usage.ru_maxrss << 10)


def _measure(places: _Places) -> dict[str, _Measured]:
    """The calls in turn, so that a machine that slows down slows all of them down."""
    measured = {name: _Measured() for name in _CALLS}
    for name in ("ls, first row", "df -v"):
        _run(_CALLS[name], places, _Measured())
    for turn in range(_ROUNDS):
        for name, call in _CALLS.items():
            if turn < call.rounds:
                _run(call, places, measured[name])
    return measured


def _alone(code: str) -> Series:
    """What a process of Python takes for less."""
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - started)
    return Series(tuple(seconds))


def run() -> str:
    """The section of the page."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        _fill(Path(folder) / "store")
        filled = time.perf_counter() - started
        nbytes = (Path(folder) / "store" / "catalog.sqlite").stat().st_size
        load = os.getloadavg()[0]
        # A child's peak counts from its fork on: a parent that holds torch would be what is measured.
        assert "torch" not in sys.modules
        measured = _measure(_places(Path(folder)))
    floors = {"python -c pass": "pass", "python -c 'import typer, pydantic'": "import typer, pydantic"}
    rows = [[name, _alone(code).spread(), "", "", ""] for name, code in floors.items()]
    rows += [_row(name, measured[name]) for name in _CALLS]
    head = ["", "ms, median (min-max)", "target, ms", "peak memory, MiB", "met"]
    told = _INTRO.format(nbytes=nbytes >> 20, filled=filled, load=load)
    return f"{TITLE}\n\n{told}\n{table(head, rows)}\n\n{machine()}.\n"


def _row(name: str, measured: _Measured) -> list[str]:
    limit, series = _CALLS[name].limit, Series(tuple(measured.seconds))
    met = measured.peak <= _MOST_MEMORY and (limit is None or series.median <= limit)
    told = "" if limit is None else f"{limit * 1e3:,.0f}"
    return [f"`{name}`", series.spread(), told, f"{measured.peak / 2**20:.0f}", "yes" if met else "no"]


def main() -> None:
    """Prints the section and puts it into the page, in the place of an older one."""
    section = run()
    print(section)
    put_section(PAGE, HEADING, TITLE, section)


if __name__ == "__main__":
    main()
