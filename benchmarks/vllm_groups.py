"""Logits of every recomputed group through vLLM, against the transformers door, in float32.

    .venv-vllm/bin/python -m benchmarks.vllm_groups [SENDER:RECEIVER]

prints the table. `python -m benchmarks.vllm` has it in its report. The sender is a vLLM engine that captures
E of all layers; the receiver's logits come from another one, and from transformers over what that sender has
stored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from benchmarks.vllm_quality import CHUNK, ENVIRONMENT, LAYERS, questions, save_models
from droidspeak.integrations.vllm_connector.arguments import Role, engine_arguments
from droidspeak.layerselect import FrontierPoint, Group, Plan, Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import SourceManifest

PAIR = "analyst:mixed"
TARGET = 1e-5


@dataclass(frozen=True)
class Job:
    """The pair, and the folder of models, policies and store."""

    folder: str
    pair: tuple[str, str]

    @property
    def root(self) -> Path:
        return Path(self.folder)

    @property
    def token_ids(self) -> list[int]:
        """The prompt."""
        return questions(self.pair[1])[0].token_ids


def plans() -> list[Plan]:
    """Full reuse, and every contiguous group."""
    groups = [Group(start, end) for start in range(LAYERS) for end in range(start, LAYERS)]
    return [Plan.recompute(LAYERS, ()), *(Plan.recompute(LAYERS, (group,)) for group in groups)]


def named(plan: Plan) -> str:
    """By its group, also if that has all layers."""
    return f"{plan.groups[0].start}-{plan.groups[0].end}" if plan.groups else "reuse"


def prepare(job: Job) -> None:
    """Both models in float32, and a policy for which the sender keeps E of all layers."""
    save_models(job.root, job.pair, "float32")
    sides = [Side.of(name, SourceManifest.from_folder(job.root / name)) for name in job.pair]
    alternate = (range(0, LAYERS, 2), range(1, LAYERS, 2))
    points = tuple(
        FrontierPoint(Plan.recompute(LAYERS, [Group(layer, layer) for layer in layers]), quality)
        for layers, quality in zip(alternate, (0.9, 1.0), strict=True)
    )
    (job.root / "policies").mkdir()
    policy = Policy(sides[0].source_id, sides[1].source_id, points)
    write_policy(job.root / "policies" / "pair.json", policy, *sides)


def engine(job: Job, name: str, role: Role) -> Any:
    """vLLM's `LLM` of one side, which tells logits."""
    from vllm import LLM

    extra = {
        "tiers": [f"disk://{job.folder}/store?min_free=0"],
        "policies": f"{job.folder}/policies",
        "chunk_size": CHUNK,
    }
    arguments = engine_arguments(role, extra, SourceManifest.from_folder(job.root / name))
    return LLM(
        model=str(job.root / name),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        block_size=32,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        dtype=arguments.dtype,
        kv_transfer_config=arguments.kv_transfer_config,
        speculative_config=arguments.speculative_config,
    )


def logits(llm: Any, token_ids: list[int], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Logits of the first token, `[vocabulary]`, and what our connector told."""
    import torch
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=-1,
        detokenize=False,
        extra_args={"kv_transfer_params": {"droidspeak": options}},
    )
    (output,) = llm.generate({"prompt_token_ids": token_ids}, parameters, use_tqdm=False)
    (place,) = output.outputs[0].logprobs
    told: dict[str, Any] = output.kv_transfer_params["droidspeak"]
    return torch.tensor([place[token].logprob for token in range(len(place))]), told


def send(job: Job) -> None:
    """The sender prefills the prompt, and its process ends when all is stored."""
    llm = engine(job, job.pair[0], Role.SENDER)
    logits(llm, job.token_ids)
    llm.llm_engine.engine_core.shutdown()


def receive(job: Job) -> dict[str, float]:
    """The largest difference of a logit by plan; and what they are to be held against."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = job.token_ids
    model = AutoModelForCausalLM.from_pretrained(job.root / job.pair[1]).eval()
    llm = engine(job, job.pair[1], Role.RECEIVER)
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector._half._connector
    look_up, receiver = connector.lookup, SourceManifest.from_folder(job.root / job.pair[1])
    apart: dict[str, float] = {}
    with torch.inference_mode():
        prefilled = logits(llm, ids, load=False)[0]
        right = model(torch.tensor([ids])).logits[0, -1]
        exactly = model.double()(torch.tensor([ids])).logits[0, -1]
        model.float()
        apart |= {
            "largest logit": float(right.abs().max()),
            "own": float((prefilled - right).abs().max()),
            "vLLM, float64": float((prefilled - exactly).abs().max()),
            "transformers, float64": float((right - exactly).abs().max()),
        }
        for plan in plans():
            # A policy has few plans, and none that recomputes all.
            def insisting(*arguments: Any, plan: Plan = plan, **options: Any) -> Any:
                return replace(look_up(*arguments, **options), plan=plan)

            connector.lookup = insisting
            ours, told = logits(llm, ids)
            assert told["plan"] == str(plan), told
            theirs = by_transformers(connector, insisting(ids, receiver), model, ids)
            apart[named(plan)] = float((ours - theirs).abs().max())
    llm.llm_engine.engine_core.shutdown()
    return apart


def by_transformers(connector: Any, match: Any, model: Any, ids: list[int]) -> Any:
    """Logits of the first token over the prefix that the transformers door mixes of the same chunks."""
    import torch

    from droidspeak.connector import Outcome
    from droidspeak.integrations.transformers import Prefix, partial_prefill

    with connector.load(match) as stream:
        layers = partial_prefill(match.plan, model, torch.tensor(ids[: match.tokens]), stream)
    outcome = Outcome(match.reason, len(ids), 0, match.shared_tokens)
    prefix = Prefix(model.config, tuple(layers), outcome)
    return model(torch.tensor([ids[match.tokens :]]), past_key_values=prefix.past_key_values).logits[0, -1]


def stage(name: str, job: Job) -> Any:
    """Runs `send` or `receive` in a process of its own; what it found."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.vllm_groups",
        "--stage",
        name,
        "--job",
        json.dumps(asdict(job)),
    ]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT}, stdout=sys.stderr)
    return json.loads((job.root / f"{name}.json").read_text())


def section(pair: str = PAIR) -> str:
    """The report's section about groups."""
    sender, _, receiver = pair.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(folder, (sender, receiver))
        prepare(job)
        stage("send", job)
        apart: dict[str, float] = stage("receive", job)
        length = len(job.token_ids)

    def cell(start: int, end: int) -> str:
        return f"{apart[f'{start}-{end}'] * 1e6:.1f}" if start <= end else ""

    rows = [[str(start), *(cell(start, end) for end in range(LAYERS))] for start in range(LAYERS)]
    groups = [apart[f"{start}-{end}"] for start in range(LAYERS) for end in range(start, LAYERS)]
    near, largest = sum(found <= TARGET for found in groups), f"{max(groups) * 1e6:.1f}"
    figures = table(["from \\ to layer", *map(str, range(LAYERS))], rows)
    return f"""## Every group against the transformers door

{sender} -> {receiver} in float32, a prompt of {length} tokens: the largest difference of any logit of the
first token, in millionths, between the receiver in vLLM and in transformers, both over the same chunks of a
vLLM sender.

{figures}

Within {TARGET * 1e6:.0f} millionths: {near} of {len(groups)} groups; largest {largest}, full reuse
{apart["reuse"] * 1e6:.1f}, of logits up to {apart["largest logit"]:.1f}. It is rounding: without any cache
both engines differ by {apart["own"] * 1e6:.1f}, and from a float64 run by
{apart["vLLM, float64"] * 1e6:.1f} (vLLM) and {apart["transformers, float64"] * 1e6:.1f} (transformers).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Every group through vLLM against the transformers door.")
    parser.add_argument("pair", nargs="?", default=PAIR, metavar="SENDER:RECEIVER")
    parser.add_argument("--stage", choices=["send", "receive"], help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.stage:
        print(section(options.pair))
        return
    described = json.loads(options.job)
    job = Job(described["folder"], tuple(described["pair"]))
    found = {"send": send, "receive": receive}[options.stage](job)
    (job.root / f"{options.stage}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
