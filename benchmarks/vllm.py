"""Time to first token inside vLLM: full prefill, reuse, and k of L recomputed layers.

    .venv-vllm/bin/python -m benchmarks.vllm            writes docs/benchmarks/vllm.md
    .venv-vllm/bin/python -m benchmarks.vllm --quick    short prompts and few rounds, printed only

Three engines run one after the other, each in a process of its own: the sender saves K, V and E of one
prompt, the receiver saves another one of its own, and a later receiver measures everything in turn. The
report ends with the logits of every group (`benchmarks.vllm_groups`) and with quality
(`benchmarks.vllm_quality`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import vllm_groups, vllm_quality
from benchmarks.measure import Series, interleaved, machine, table
from droidspeak.integrations.vllm_connector.arguments import Role, engine_arguments
from droidspeak.layerselect import FrontierPoint, Group, Plan, Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import SourceManifest

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 16, 512, 8, 4, 64
SUFFIX, VOCABULARY = 16, 2048
COUNTS = (0, 1, 2, 4, 8)
SLOW_COUNTS = (4, 8)
SECONDS_PER_LAYER = 0.060
SENT, OWN = 1, 2  # seeds of the two prompts
REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "vllm.md"


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        folder: of models, policies and store.
        tokens: of the prefix that is loaded.
    """

    folder: str
    tokens: int
    rounds: int
    dtype: str

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def prompt(self, seed: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(3, VOCABULARY) for _ in range(self.tokens + SUFFIX)]


def plan(count: int) -> Plan:
    """`count` layers from layer 4 on are recomputed."""
    groups = [Group(LAYERS // 4, LAYERS // 4 + count - 1)] if count else []
    return Plan.recompute(LAYERS, groups)


def floor(count: int) -> float:
    """The quality floor that makes a request get the plan of `count` layers."""
    return (COUNTS.index(count) + 1) / len(COUNTS)


def random_model() -> Any:
    """The model of these benchmarks, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


def prepare(task: Task) -> None:
    """Two models of random weights, and a policy with one plan per count."""
    import torch

    sides = []
    for seed, name in enumerate(("sender", "receiver")):
        torch.manual_seed(seed)
        random_model().to(getattr(torch, task.dtype)).save_pretrained(task.root / name)
        sides.append(Side.of(name, SourceManifest.from_folder(task.root / name)))
    points = tuple(FrontierPoint(plan(count), floor(count)) for count in COUNTS)
    (task.root / "policies").mkdir()
    policy = Policy(sides[0].source_id, sides[1].source_id, points)
    write_policy(task.root / "policies" / "pair.json", policy, *sides)


# --- in an engine's process ---


def engine(task: Task, name: str, role: Role) -> Any:
    """vLLM's `LLM` of one model. Its own prefix cache is off, so that the same prompt can be timed again."""
    from vllm import LLM

    store = f"disk://{task.folder}/store?min_free=0"
    extra = {"tiers": [store], "policies": f"{task.folder}/policies"}
    manifest = SourceManifest.from_folder(task.root / name)
    arguments = engine_arguments(role, extra, manifest)
    longest = task.tokens + 256
    return LLM(
        model=str(task.root / name),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        block_size=32,
        dtype=arguments.dtype,
        kv_transfer_config=arguments.kv_transfer_config,
        speculative_config=arguments.speculative_config,
    )


def first_token(llm: Any, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Prefills `prompt` and makes one token; what our connector told of it."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        extra_args={"kv_transfer_params": {"droidspeak": options}},
    )
    (output,) = llm.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
    told: dict[str, Any] = output.kv_transfer_params["droidspeak"]
    return told


def save(task: Task, name: str, seed: int) -> None:
    """One model prefills one prompt, and saves it before its process ends."""
    llm = engine(task, name, Role.SENDER)
    first_token(llm, task.prompt(seed))
    llm.llm_engine.engine_core.shutdown()


def measure(task: Task) -> dict[str, Any]:
    """Seconds of each way, all in turn, in one engine; and on what machine."""
    llm = engine(task, "receiver", Role.RECEIVER)
    try:
        series = interleaved(calls(task, llm), rounds=task.rounds)
    finally:
        llm.llm_engine.engine_core.shutdown()
    seconds = {name: taken.seconds for name, taken in series.items()}
    return {"seconds": seconds, "machine": machine()}


def calls(task: Task, llm: Any) -> dict[str, Callable[[], object]]:
    """A first token each way, with a check that it came that way."""

    def call(expected: tuple[int, int, str | None], seed: int, **options: Any) -> Callable[[], object]:
        def run() -> None:
            told = first_token(llm, task.prompt(seed), **options)
            assert (told["exact_tokens"], told["shared_tokens"], told["plan"]) == expected, told

        return run

    def shared(count: int) -> Callable[[], object]:
        return call((0, task.tokens, str(plan(count))), SENT, quality_floor=floor(count))

    return {
        "full": call((0, 0, None), SENT, load=False),
        "exact": call((task.tokens, 0, None), OWN),
        **{str(count): shared(count) for count in COUNTS},
        **{f"slow {count}": over_slow_link(task, shared(count)) for count in SLOW_COUNTS},
    }


def over_slow_link(task: Task, run: Callable[[], object]) -> Callable[[], object]:
    """`run` while the store is behind a link that takes `SECONDS_PER_LAYER` for K and V of one layer."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from droidspeak.connector.layout import RowLayout
    from droidspeak.storage.wrappers import LatencyTier

    connector = get_kv_transfer_group()._connector  # no option can make a store slow
    layout = RowLayout.of(SourceManifest.from_folder(task.root / "receiver").architecture)

    def slowly() -> None:
        fast = connector.store
        connector.store = LatencyTier(fast, bandwidth=layout.kv_bytes * task.tokens / SECONDS_PER_LAYER)
        try:
            run()
        finally:
            connector.store = fast

    return slowly


# --- the report ---


def ttft_rows(series: dict[str, Series]) -> list[list[str]]:
    full, reuse, exact = series["full"], series["0"], series["exact"]
    rows = [["full prefill", full.spread(digits=0), "1.0x", "", "", ""]]
    name = "own cache, stored by an earlier process"
    rows.append([name, exact.spread(digits=0), f"{exact.ratio(full):.1f}x", "", "", ""])
    for count in COUNTS:
        ours = series[str(count)]
        limit = 1.15 * (reuse.median + count / LAYERS * full.median)
        against = [f"{limit * 1e3:,.0f}", f"{ours.median / limit:.2f}", "<= 1"] if count else ["", "", ""]
        name = f"{count} of {LAYERS} recomputed"
        rows.append([name, ours.spread(digits=0), f"{ours.ratio(full):.1f}x", *against])
    return rows


def slow_rows(series: dict[str, Series]) -> list[list[str]]:
    rows = []
    for count in SLOW_COUNTS:
        fast, slow = series[str(count)].median, series[f"slow {count}"]
        e = SECONDS_PER_LAYER * HIDDEN / (2 * KV_HEADS * HEAD_DIM)
        transfer = SECONDS_PER_LAYER * (LAYERS - count)
        hidden = fast + e + transfer - slow.median
        # At best the slow link is busy while the engine does all that it has to do.
        most = min(transfer, fast)
        times = (fast, e, transfer, fast + e + transfer)
        rows.append([f"{count} of {LAYERS}", *(f"{1e3 * seconds:,.0f}" for seconds in times)])
        rows[-1] += [slow.spread(digits=0), f"{1e3 * hidden:,.0f}", f"{1e3 * most:,.0f}"]
        rows[-1].append(f"{hidden / most:.2f}")
    return rows


def report(task: Task, series: dict[str, Series], where: str) -> str:
    import vllm

    columns = ["", "TTFT, ms", "against full", "1.15 x (reuse + k/L full), ms", "ours / that", "target"]
    slow_columns = [
        "recomputed",
        "TTFT, ms",
        "E comes in, ms",
        "K and V come in, ms",
        "one after the other, ms",
    ]
    slow_columns += ["TTFT over the slow link, ms", "hidden, ms", "could be hidden, ms", "share"]
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"""# vLLM

Made by `make bench-vllm` on {today}: {where},
vLLM {vllm.__version__} on the CPU, eager. Llama of {LAYERS} layers, hidden {HIDDEN}, {HEADS} query and
{KV_HEADS} KV heads, {task.dtype}, random weights; {task.tokens:,} tokens in the store (disk tier, warm page
cache, raw codec, chunks of 256), {SUFFIX} new ones, one generated. Medians of {task.rounds} rounds in one
engine process in which all ways take turns, with minimum and maximum. The sender, and the receiver that
had stored its own cache, ran before in other processes.

## Time to first token

{table(columns, ttft_rows(series))}

## What a slow link costs

The store is behind a link that takes {SECONDS_PER_LAYER * 1e3:.0f} ms for K and V of one layer. E must
be there before recomputing starts, so nothing hides it; K and V come while the engine works. What can be
hidden is the lesser of their transfer and the engine's work.

{table(slow_columns, slow_rows(series))}

## Against LMCache

The reuse of a model's own cache, within a process and after a restart, against LMCache's in-process
connector: [vllm_lmcache.md](vllm_lmcache.md), made by `make bench-vllm-lmcache`.
"""


def stage(name: str, task: Task) -> Any:
    """Runs a stage in a process of its own; what it measured."""
    described = json.dumps(dataclasses.asdict(task))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm", "--stage", name, "--task", described],
        check=True,
        env={**os.environ, **vllm_quality.ENVIRONMENT},
        stdout=sys.stderr,
    )
    result = task.root / f"{name}.json"
    return json.loads(result.read_text()) if result.exists() else None


def run_stage(name: str, task: Task) -> None:
    """One of `send`, `own`, `measure`, in this process."""
    if name == "measure":
        (task.root / "measure.json").write_text(json.dumps(measure(task)))
    else:
        save(task, *{"send": ("sender", SENT), "own": ("receiver", OWN)}[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token inside vLLM.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--stage", choices=["send", "own", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, Task(**json.loads(options.task)))
        return
    with tempfile.TemporaryDirectory() as folder:
        task = Task(folder, 512 if options.quick else 4096, 2 if options.quick else 5, options.dtype)
        prepare(task)
        for name in ("send", "own"):
            stage(name, task)
        measured = stage("measure", task)
    series = {name: Series(tuple(seconds)) for name, seconds in measured["seconds"].items()}
    parts = [report(task, series, measured["machine"])]
    if not options.quick:
        parts += [vllm_groups.section(), vllm_quality.section()]
    text = "\n".join(parts)
    print(text)
    if not options.quick:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
