"""Exact reuse inside vLLM: DroidSpeak's connector against LMCache's in-process one, from the local disk.

    make bench-vllm-lmcache                             writes docs/benchmarks/vllm_lmcache.md
    .venv-vllm/bin/python -m benchmarks.vllm_lmcache --quick    a short prompt and one round, printed only

Each way has an engine in a process of its own. First one engine of each way stores the prompt and ends. Then,
in every round, all engines start anew, are asked for the prompt for the first time, and then several times in
turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.measure import Series, machine, table
from benchmarks.vllm import HEADS, HIDDEN, KV_HEADS, LAYERS, SUFFIX, VOCABULARY, random_model
from benchmarks.vllm_quality import ENVIRONMENT
from droidspeak.integrations.vllm_connector.arguments import Role, engine_arguments
from droidspeak.storage import SourceManifest

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "benchmarks" / "vllm_lmcache.md"
PACKAGES = ROOT / ".venv-vllm" / "lmcache"
OURS, LOCAL_DISK, FILES = "DroidSpeak", "LMCache, local disk backend", "LMCache, file system connector"
WAYS = (OURS, LOCAL_DISK, FILES)
CHUNK = 256
MAIN, WARMING = 1, 2  # seeds of the two prompts
LATER = 3
"""Requests in turn, in each round, after the first."""


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        folder: of the model and the stores.
        tokens: of the prefix that is reused.
    """

    folder: str
    tokens: int
    rounds: int

    @property
    def root(self) -> Path:
        return Path(self.folder)

    @property
    def model(self) -> Path:
        return self.root / "model"

    def store(self, way: str) -> Path:
        return self.root / f"store-{WAYS.index(way)}"

    def prompt(self, seed: int) -> list[int]:
        """The one that is measured, or a short one that warms an engine up."""
        draw = random.Random(seed)
        tokens = self.tokens if seed == MAIN else 2 * CHUNK
        return [draw.randrange(3, VOCABULARY) for _ in range(tokens + SUFFIX)]

    def lmcache(self, way: str) -> dict[str, Any]:
        """LMCache's configuration. Its memory passes chunks on, and keeps none."""
        place = str(self.store(way))
        common = {"chunk_size": CHUNK, "local_cpu": False, "max_local_cpu_size": 0.25}
        if way == LOCAL_DISK:
            return {**common, "local_disk": place, "max_local_disk_size": 4}
        extra = {"remote_storage_plugin.fs.base_path": place}
        return {**common, "remote_storage_plugins": ["fs"], "extra_config": extra}


def prepare(task: Task) -> None:
    """The model, of random weights."""
    import torch

    torch.manual_seed(0)
    random_model().to(torch.bfloat16).save_pretrained(task.model)


# --- in an engine's process ---


def transfer_config(task: Task, way: str) -> dict[str, Any]:
    """vLLM's `KVTransferConfig` of one way; it loads and saves."""
    if way == OURS:
        extra = {"tiers": [f"disk://{task.store(way)}?min_free=0"], "chunk_size": CHUNK}
        return engine_arguments(Role.BOTH, extra, SourceManifest.from_folder(task.model)).kv_transfer_config
    return {
        "kv_connector": "LMCacheOnCpu",
        "kv_connector_module_path": "benchmarks.lmcache_pages",
        "kv_role": Role.BOTH.kv_role,
    }


def engine(task: Task, way: str) -> Any:
    """vLLM's `LLM`. Its own prefix cache is off, so that the same prompt can be timed again."""
    from vllm import LLM

    longest = max(task.tokens, 2 * CHUNK) + 256
    return LLM(
        model=str(task.model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        block_size=32,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        kv_transfer_config=transfer_config(task, way),
    )


def answer(llm: Any, prompt: list[int], cache: bool, logits: bool) -> dict[str, Any]:
    """Prefills `prompt` and makes one token.

    Args:
        cache: our connector may load and save. LMCache has no such switch.
        logits: tell those of the token, `[vocabulary]`.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=-1 if logits else None,
        detokenize=False,
        extra_args=None if cache else {"kv_transfer_params": {"droidspeak": {"load": False, "save": False}}},
    )
    started = time.perf_counter()
    (output,) = llm.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
    seconds = time.perf_counter() - started
    told = {"seconds": seconds, "cached": output.num_cached_tokens}
    if logits:
        (place,) = output.outputs[0].logprobs
        told["logits"] = [place[token].logprob for token in range(len(place))]
    return told


def wait_until_stored(prompt: list[int]) -> None:
    """LMCache writes after a request has ended; until it finds all chunks of `prompt` itself."""
    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.cache_engine import LMCacheEngineBuilder

    cache, whole = LMCacheEngineBuilder.get(ENGINE_NAME), len(prompt) // CHUNK * CHUNK
    deadline = time.monotonic() + 60
    while (found := cache.lookup(prompt)) < whole:
        if time.monotonic() > deadline:
            raise TimeoutError(f"LMCache has stored {found} of {whole} tokens")
        time.sleep(0.02)


def serve(task: Task, way: str, orders: TextIO, answers: TextIO) -> None:
    """Answers orders, a JSON object in a line each, until they end."""
    llm = engine(task, way)
    print(json.dumps({"machine": machine()}), file=answers, flush=True)
    for line in orders:
        order = json.loads(line)
        prompt = task.prompt(order["seed"])
        told = answer(llm, prompt, order["cache"], order["logits"])
        if way != OURS:
            wait_until_stored(prompt)
        print(json.dumps(told), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()


def run_engine(task: Task, way: str) -> None:
    """`serve` over the standard streams; what vLLM prints goes to the standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(task, way, sys.stdin, answers)
    answers.flush()
    os._exit(0)  # LMCache's threads would keep the process


# --- in the parent ---


class Engine:
    """One engine in a process of its own. Leaving it ends the process when all is stored."""

    def __init__(self, task: Task, way: str) -> None:
        command = [sys.executable, "-m", "benchmarks.vllm_lmcache", "--way", way]
        command += ["--task", json.dumps(dataclasses.asdict(task))]
        self.way = way
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment(task, way)},
        )
        self.machine: str = self._read()["machine"]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_raised: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise subprocess.CalledProcessError(self._process.returncode, self.way)

    def ask(self, seed: int = MAIN, *, cache: bool = True, logits: bool = False) -> dict[str, Any]:
        """What `answer` tells."""
        assert self._process.stdin is not None
        order = {"seed": seed, "cache": cache, "logits": logits}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self._process.wait(), self.way)
        told: dict[str, Any] = json.loads(line)
        return told


def environment(task: Task, way: str) -> dict[str, str]:
    """Of an engine's process. LMCache's hashes of tokens are the same in all of them."""
    if way == OURS:
        return ENVIRONMENT
    config = task.root / f"lmcache-{WAYS.index(way)}.yaml"
    config.write_text(json.dumps(task.lmcache(way)))  # JSON is YAML
    return {
        **ENVIRONMENT,
        "PYTHONPATH": str(PACKAGES),
        "PYTHONHASHSEED": "0",
        "LMCACHE_CONFIG_FILE": str(config),
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
        "LMCACHE_LOG_LEVEL": "ERROR",
    }


@dataclass
class Measured:
    """Seconds by way, in the order of rounds.

    Attributes:
        first: of the first request after a start.
        later: of those after it, in the same process.
        full: of a prefill without any cache.
        found: tokens that came from the cache in the first request, by way; in later ones all do.
        apart: the largest difference of a logit between reuse and the full prefill, by way; and between
            LMCache's reuse and ours.
        largest: logit.
        files: that were on the disk before the first round, by way.
        machine: in words.
    """

    first: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    later: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    full: list[float] = field(default_factory=list)
    found: dict[str, set[int]] = field(default_factory=lambda: {way: set() for way in WAYS})
    apart: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    files: dict[str, int] = field(default_factory=dict)
    machine: str = ""


def store(task: Task) -> dict[str, int]:
    """An engine of each way stores both prompts and ends; how many files that left."""
    for way in WAYS:
        with Engine(task, way) as storing:
            for seed in (WARMING, MAIN):
                storing.ask(seed)
    return {way: sum(path.is_file() for path in task.store(way).rglob("*")) for way in WAYS}


def measure(task: Task) -> Measured:
    """All rounds."""
    measured = Measured(files=store(task))
    for number in range(task.rounds):
        with ExitStack() as stack:
            engines = [stack.enter_context(Engine(task, way)) for way in WAYS]
            measured.machine = engines[0].machine
            one_round(engines, measured, number, task.tokens)
            if number == 0:
                compare(engines, measured)
    return measured


def one_round(engines: list[Engine], measured: Measured, number: int, tokens: int) -> None:
    """Engines that have just started; a short prompt, twice, loads what they import late."""
    for started in engines:
        started.ask(WARMING)
        started.ask(WARMING)
    measured.full.append(engines[WAYS.index(OURS)].ask(cache=False)["seconds"])
    for started in rotated(engines, number):
        told = started.ask()
        measured.first[started.way].append(told["seconds"])
        measured.found[started.way].add(told["cached"])
    for turn in range(LATER):
        for started in rotated(engines, number + turn):
            told = started.ask()
            assert told["cached"] == tokens, (started.way, told)
            measured.later[started.way].append(told["seconds"])


def rotated(engines: list[Engine], turn: int) -> Iterable[Engine]:
    """Every way goes first as often as the others."""
    place = turn % len(engines)
    return (*engines[place:], *engines[:place])


def compare(engines: list[Engine], measured: Measured) -> None:
    """The logits of reuse against those of the full prefill."""
    full = engines[WAYS.index(OURS)].ask(cache=False, logits=True)["logits"]
    reused = {each.way: each.ask(logits=True)["logits"] for each in engines}
    measured.largest = max(map(abs, full))
    measured.apart = {way: largest_difference(found, full) for way, found in reused.items()}
    for way in WAYS:
        if way != OURS:
            measured.apart[f"{way}, ours"] = largest_difference(reused[way], reused[OURS])


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


# --- the report ---


def ttft_rows(task: Task, measured: Measured) -> list[list[str]]:
    full = Series(tuple(measured.full))
    rows = [["full prefill, no cache", "", full.spread(digits=0), "", ""]]
    for way in WAYS:
        first, later = (
            Series(tuple(seconds[way])).spread(digits=0) for seconds in (measured.first, measured.later)
        )
        found = " or ".join(f"{tokens:,}" for tokens in sorted(measured.found[way]))
        rows.append([way, found, first, f"{task.tokens:,}", later])
    return rows


def target_rows(measured: Measured) -> list[list[str]]:
    """Ours against LMCache's, by medians of the rounds' ratios."""
    first, later = measured.first, measured.later
    compared = [
        ("the target: after a restart, against the local disk backend", first[OURS], first[LOCAL_DISK]),
        ("in one process, against the local disk backend", later[OURS], later[LOCAL_DISK]),
        ("after a restart, against the file system connector", first[OURS], first[FILES]),
        ("in one process, against the file system connector", later[OURS], later[FILES]),
    ]
    rows = []
    for name, ours, theirs in compared:
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ratios)
        spread = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        rows.append([name, spread, "<= 1", "yes" if ratio <= 1 else "**no**"])
    return rows


def right_rows(measured: Measured) -> list[list[str]]:
    rows = []
    for way in WAYS:
        against = "" if way == OURS else f"{measured.apart[f'{way}, ours']:.3g}"
        rows.append([way, f"{measured.apart[way]:.3g}", against])
    return rows


def report(task: Task, measured: Measured, load: float) -> str:
    import vllm

    today = datetime.datetime.now(tz=datetime.UTC).date()
    times = ["", "tokens from the cache", "first request, ms", "tokens from the cache", "later requests, ms"]
    return f"""# vLLM: exact reuse against LMCache

Made by `make bench-vllm-lmcache` on {today}: {measured.machine},
vLLM {vllm.__version__} on the CPU, eager, LMCache {lmcache_version()}. Llama of {LAYERS} layers, hidden
{HIDDEN}, {HEADS} query and {KV_HEADS} KV heads, bfloat16, random weights; {task.tokens:,} tokens from the
cache, chunks of {CHUNK}, {SUFFIX} new ones, one generated. Load average of the machine before: {load:.1f}.

One engine of each way stored the prompt and ended. In each of {task.rounds} rounds all engines started anew,
side by side, each in a process of its own, and took turns, each way as often first as the others. All load
and save (`kv_both`), ours with `vllm.load: sync`. Medians with minimum and maximum; the page cache is warm.

## Time to first token

{table(times, ttft_rows(task, measured))}

- **First request**: the first for this prompt after the start. Before it, each engine had prefilled and
  reused another, short one. LMCache's local disk backend keeps its index in memory only: the
  {measured.files[LOCAL_DISK]} files of the earlier process are still on the disk and are not found, so the
  prompt is prefilled, and stored again.
- **Later requests**: {LATER} in each round, in the same process, without vLLM's own prefix cache. This is
  what LMCache's local disk backend can do, at its best.
- LMCache's **file system connector** (`remote_storage_plugins: ["fs"]`) finds files by their names: it
  survives a restart, as we do.

## Ours / LMCache

{table(["", "ratio of TTFT", "target", "met"], target_rows(measured))}

Ratios of what was measured in the same turn: median, minimum and maximum.

## What LMCache was given

LMCache is as published, with `local_cpu: false` and 0.25 GB of memory to pass chunks on, so that each request
reads from the disk, as ours does. On the CPU it has nothing that moves KV in and out of an engine ("No
supported cpu connector found"); `benchmarks/lmcache_pages.py` adds that. It copies vLLM's pages whole and
sorts nothing, the least work that there is. LMCache does not check what it reads; we verify checksums.

The largest difference of any logit of the first token, of logits up to {measured.largest:.2f}; reuse and full
prefill differ by the rounding of bfloat16.

{table(["reuse", "against the full prefill", "against our reuse"], right_rows(measured))}
"""


def lmcache_version() -> str:
    (found,) = PACKAGES.glob("lmcache-*.dist-info")
    return found.name.removeprefix("lmcache-").removesuffix(".dist-info")


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact reuse inside vLLM, against LMCache's connector.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_engine(Task(**json.loads(options.task)), options.way)
        return
    if not PACKAGES.exists():
        parser.error("LMCache is not there: run make bench-vllm-lmcache")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(folder, 1024 if options.quick else 4096, 1 if options.quick else 5)
        prepare(task)
        text = report(task, measure(task), load)
    print(text)
    if not options.quick:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
