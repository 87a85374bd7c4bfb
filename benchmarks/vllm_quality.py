"""Quality of shared caches through vLLM, against the transformers door: pairs of the lab, held-out prompts.

    .venv-vllm/bin/python -m benchmarks.vllm_quality [SENDER:RECEIVER ...]
    .venv-vllm/bin/python -m benchmarks.vllm_quality --write

The first prints the section, the second also puts it into the page, in the place of the older one; `python -m
benchmarks.vllm` has it in its report. Each sender prefills all prefixes in a vLLM engine of its own, with its
name for salt; each receiver answers all questions about them in another engine, by plans that were chosen on
calibration prompts (`lab/pairs.json`), with maps that were fitted on calibration prompts. The transformers
door does the same on its own store, with its own senders, by the same policies and files of maps. All that
twice: in bfloat16, as the models are shipped, and in float32, where rounding decides next to nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.measure import machine, put_section, table
from droidspeak.integrations.vllm_connector.arguments import Role, engine_arguments
from droidspeak.layerselect import FrontierPoint, Group, MapFile, Plan, Policy, Requirement
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.layerselect.mapfeatures import MapFeatures
from droidspeak.layerselect.metrics import Metric, exact_match, f1
from droidspeak.layerselect.policy import Costs
from droidspeak.prompts import load_prompts
from droidspeak.storage import SourceManifest

LAB = Path(__file__).parents[1] / "lab"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "vllm.md"
TITLE = "## Quality on the lab's pairs"
LAYERS, SIZES, CHUNK, NEW = 12, (1, 2, 3), 16, 16
MAPPED = 2  # layers of the group that plans with maps recompute: one that starts from the sender's E
FEATURES = MapFeatures.EMBEDDING
PAIRS = ("coder:base", "analyst:base", "base:coder", "analyst:inverse", "inverse:mixed", "mixed:analyst")
DTYPES = ("bfloat16", "float32")
TARGET = 0.005
# Not measured: they put the plans into an order, in which mapping a layer takes less than recomputing one.
COSTS = Costs(per_token=1.0, per_mapped_token=1 / 32)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}

Answers = dict[str, list[list[int]]]
"""Token ids that were said to each question, by method."""


@dataclass(frozen=True)
class Job:
    """What one engine does.

    Attributes:
        folder: of models, policies and store.
        model: that it serves.
        others: receivers whose prefixes it prefills, or senders whose caches it uses.
    """

    folder: str
    model: str
    others: tuple[str, ...]

    @property
    def root(self) -> Path:
        return Path(self.folder)


@dataclass(frozen=True)
class Question:
    """One held-out prompt in token ids."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    expected: tuple[int, ...]

    @property
    def token_ids(self) -> list[int]:
        return [*self.prefix, *self.suffix]


@cache
def questions(receiver: str, *, calibration: bool = False) -> tuple[Question, ...]:
    """The receiver's prompts: those that are held out, or those for calibration."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB / "models" / receiver)

    def ids(text: str | tuple[int, ...]) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    prompts = load_prompts(LAB / "prompts" / f"{receiver}{'.calibration' if calibration else ''}.jsonl")
    return tuple(Question(ids(row.prefix), ids(row.question), ids(row.answer)) for row in prompts)


def prefixes(receiver: str, *, calibration: bool = False) -> list[list[int]]:
    """Each prefix of the receiver's prompts once."""
    asked = questions(receiver, calibration=calibration)
    return [list(prefix) for prefix in dict.fromkeys(question.prefix for question in asked)]


@cache
def plans(sender: str, receiver: str) -> tuple[Plan, ...]:
    """Full reuse, and the group of each of `SIZES` that diverged least on calibration prompts, and maps.

    Full reuse with K and V mapped, and the group of `MAPPED` layers from a mapped E: with K and V of the
    other layers as they are, mapped before the group, and mapped everywhere. In the order of their work.
    """
    pairs = json.loads((LAB / "pairs.json").read_text())
    (pair,) = (pair for pair in pairs if (pair["sender"], pair["receiver"]) == (sender, receiver))
    chosen = {row["end"] - row["start"] + 1: Group(row["start"], row["end"]) for row in pair["chosen"]}
    plain = [Plan.recompute(LAYERS, group) for group in ((), *((chosen[size],) for size in SIZES))]
    group = chosen[MAPPED]
    mapped = [Plan.recompute(LAYERS, (), mapped=range(LAYERS))]
    for layers in ((), range(group.start), range(LAYERS)):
        mapped.append(Plan.recompute(LAYERS, [group], map_e=True, mapped=layers))
    return tuple(sorted({*plain, *mapped}, key=lambda plan: (plan.recomputed, plan.maps)))


def floors(sender: str, receiver: str) -> dict[str, float]:
    """The quality floor that makes a request get each plan: by `COSTS` those after it take longer."""
    found = plans(sender, receiver)
    return {str(plan): (place + 1) / len(found) for place, plan in enumerate(found)}


def end_of_answer(receiver: str) -> int:
    """The token that ends an answer."""
    config = json.loads((LAB / "models" / receiver / "config.json").read_text())
    return int(config["eos_token_id"])


def save_models(root: Path, names: Iterable[str], dtype: str) -> None:
    """Models of the lab in another dtype, without their tokenizers."""
    from transformers import AutoModelForCausalLM

    for name in names:
        AutoModelForCausalLM.from_pretrained(LAB / "models" / name, dtype=dtype).save_pretrained(root / name)


def prepare(root: Path, pairs: Sequence[tuple[str, str]], dtype: str) -> None:
    """The models, and a policy with maps for each pair."""
    save_models(root, {name for pair in pairs for name in pair}, dtype)
    (root / "policies").mkdir()
    for sender, receiver in pairs:
        sides = [Side.of(name, SourceManifest.from_folder(root / name)) for name in (sender, receiver)]
        ids = sides[0].source_id, sides[1].source_id
        levels = floors(sender, receiver).values()
        points = tuple(FrontierPoint(*point) for point in zip(plans(sender, receiver), levels, strict=True))
        policy = Policy(*ids, points, costs=COSTS, maps=fit(root, sender, receiver, ids))
        write_policy(root / "policies" / f"{sender}-{receiver}.json", policy, *sides)


def fit(root: Path, sender: str, receiver: str, ids: tuple[str, str]) -> MapFile:
    """Maps of all that the plans map, fitted on the prefixes of the receiver's calibration prompts."""
    import torch

    from droidspeak.integrations.transformers.decoder import Decoder
    from droidspeak.integrations.transformers.fitting import fit_maps
    from droidspeak.integrations.transformers.loading import load_model

    torch.set_num_threads(1)
    sending, receiving = (Decoder(load_model(root / name)) for name in (sender, receiver))
    prompts = [torch.tensor(prefix) for prefix in prefixes(receiver, calibration=True)]
    starts = {layer for plan in plans(sender, receiver) if plan.map_e for layer in plan.transition_layers}
    fitted = fit_maps(sending, receiving, prompts, [FEATURES], e_layers=sorted(starts), pair=ids)
    return fitted[FEATURES].save(root / "policies" / f"{sender}-{receiver}.safetensors")


# --- through vLLM ---


def engine(job: Job, role: Role) -> Any:
    """vLLM's `LLM` of the job's model; every prompt is loaded anew."""
    from vllm import LLM

    extra = {
        "tiers": [f"disk://{job.folder}/store?min_free=0"],
        "policies": f"{job.folder}/policies",
        "chunk_size": CHUNK,
    }
    folder = job.root / job.model
    arguments = engine_arguments(role, extra, SourceManifest.from_folder(folder))
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        block_size=32,
        dtype=arguments.dtype,
        kv_transfer_config=arguments.kv_transfer_config,
        speculative_config=arguments.speculative_config,
    )


def generate(
    llm: Any, prompts: Sequence[list[int]], new: int, salt: str | None, end: int | None, **options: Any
) -> list[Any]:
    """vLLM's outputs to `prompts`, greedily."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0,
        max_tokens=new,
        detokenize=False,
        stop_token_ids=None if end is None else [end],
        extra_args={"kv_transfer_params": {"droidspeak": options}},
    )
    salted = {} if salt is None else {"cache_salt": salt}
    given = [{"prompt_token_ids": prompt, **salted} for prompt in prompts]
    return list(llm.generate(given, parameters, use_tqdm=False))


def send(job: Job) -> None:
    """Prefills the prefixes of the job's receivers, under the sender's name."""
    llm = engine(job, Role.SENDER)
    for receiver in job.others:
        generate(llm, prefixes(receiver), 1, job.model, None)
    llm.llm_engine.engine_core.shutdown()


def receive(job: Job) -> dict[str, Answers]:
    """Answers to all questions by all plans, by sender; those of the own prefill are under the own name."""
    llm, end = engine(job, Role.RECEIVER), end_of_answer(job.model)
    asked = questions(job.model)
    prompts = [question.token_ids for question in asked]

    def said(plan: str | None, salt: str | None, **options: Any) -> list[list[int]]:
        outputs = generate(llm, prompts, NEW, salt, end, **options)
        for question, output in zip(asked, outputs, strict=True):
            told = output.kv_transfer_params["droidspeak"]
            shared = 0 if plan is None else len(question.prefix) // CHUNK * CHUNK
            assert (told["plan"], told["shared_tokens"]) == (plan, shared), told
        return [[token for token in output.outputs[0].token_ids if token != end] for output in outputs]

    try:
        found: dict[str, Answers] = {job.model: {"full prefill": said(None, None, load=False)}}
        for sender in job.others:
            levels = floors(sender, job.model).items()
            found[sender] = {plan: said(plan, sender, quality_floor=level) for plan, level in levels}
    finally:
        llm.llm_engine.engine_core.shutdown()
    return found


def stage(name: str, job: Job) -> Any:
    """Runs `send` or `receive` in a process of its own; what it found."""
    result = job.root / f"{name}-{job.model}.json"
    described = json.dumps(dataclasses.asdict(job))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_quality", "--stage", name, "--job", described],
        check=True,
        env={**os.environ, **ENVIRONMENT},
        stdout=sys.stderr,
    )
    return json.loads(result.read_text())


def run_stage(name: str, job: Job) -> None:
    """One of `send`, `receive`, in this process."""
    found = {"send": send, "receive": receive}[name](job)
    (job.root / f"{name}-{job.model}.json").write_text(json.dumps(found))


# --- through transformers ---


def by_transformers(root: Path, sender: str, receiver: str) -> Answers:
    """What the receiver says by each plan, and by its own prefill, with a sender of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from droidspeak.connector import ConnectorOptions
    from droidspeak.integrations.transformers import DroidSpeak
    from droidspeak.layerselect import PolicySet
    from droidspeak.storage.memory import MemoryTier

    torch.set_num_threads(1)
    store, followed = MemoryTier(1 << 30), PolicySet.from_folder(root / "policies")

    def door(name: str, *, save: bool) -> DroidSpeak:
        folder = root / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        return DroidSpeak(
            model, store, followed, folder=folder, options=ConnectorOptions(chunk_size=CHUNK), save=save
        )

    with door(sender, save=True) as sending, door(receiver, save=False) as receiving:
        for prefix in prefixes(receiver):
            sending.prefill(prefix)
        sending.flush()
        end = end_of_answer(receiver)
        methods: Mapping[str, float | None] = {"full prefill": None, **floors(sender, receiver)}
        return {
            method: [greedy(receiving, question, level, end) for question in questions(receiver)]
            for method, level in methods.items()
        }


def greedy(door: Any, question: Question, level: float | None, end: int) -> list[int]:
    """The answer by the plan that reaches `level`, or by the own prefill."""
    import torch

    prefix = door.prefill(question.token_ids, requirement=Requirement(level or 0.0), share=level is not None)
    shared = 0 if level is None else len(question.prefix) // CHUNK * CHUNK
    assert prefix.outcome.shared_tokens == shared, prefix.outcome
    cache, said = prefix.past_key_values, list[int]()
    step = question.token_ids[prefix.tokens :]
    with torch.inference_mode():
        while len(said) < NEW:
            token = int(door.model(torch.tensor([step]), past_key_values=cache).logits[0, -1].argmax())
            if token == end:
                break
            said.append(token)
            step = [token]
    return said


# --- the report ---


@dataclass(frozen=True)
class Score:
    """Of one method on one pair, through vLLM and through transformers.

    Attributes:
        same: share of questions to which both say the same.
    """

    pair: str
    method: str
    exact: tuple[float, float]
    f1: tuple[float, float]
    same: float

    @property
    def apart(self) -> float:
        """The larger difference of both measures."""
        return max(abs(one - other) for one, other in (self.exact, self.f1))

    @property
    def mapped(self) -> bool:
        """Whether the method maps."""
        return "map" in self.method

    @property
    def figures(self) -> list[str]:
        return [f"{figure:.3f}" for figure in (*self.exact, *self.f1, self.same)]


def scores(sender: str, receiver: str, vllm: Answers, transformers: Answers) -> list[Score]:
    """Of all methods on one pair."""
    expected = [question.expected for question in questions(receiver)]

    def means(metric: Metric, method: str) -> tuple[float, float]:
        both = (vllm[method], transformers[method])
        one, other = (fmean(map(metric, answers, expected)) for answers in both)
        return one, other

    return [
        Score(
            f"{sender} -> {receiver}",
            method,
            means(exact_match, method),
            means(f1, method),
            fmean(one == other for one, other in zip(vllm[method], transformers[method], strict=True)),
        )
        for method in transformers
    ]


def measure(pairs: Sequence[tuple[str, str]], dtype: str) -> list[Score]:
    """All methods on all pairs."""
    senders, receivers = (tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    found: dict[tuple[str, str], Answers] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), pairs, dtype)
        for name in senders:
            stage("send", Job(folder, name, tuple(to for sender, to in pairs if sender == name)))
        for name in receivers:
            others = tuple(sender for sender, to in pairs if to == name)
            answers = stage("receive", Job(folder, name, others))
            found |= {(sender, name): {**answers[name], **answers[sender]} for sender in others}
        return [
            score
            for pair in pairs
            for score in scores(*pair, found[pair], by_transformers(Path(folder), *pair))
        ]


def verdict(title: str, found: Sequence[Score], prompts: int) -> str:
    """How far apart both doors are."""
    near = sum(score.apart <= TARGET for score in found)
    worst = max(found, key=lambda score: score.apart)
    over_all = [100 * fmean(one - other for one, other in (score.exact for score in found))]
    over_all.append(100 * fmean(one - other for one, other in (score.f1 for score in found)))
    return (
        f"{title}: within {100 * TARGET} points in both measures {near} of {len(found)}; largest "
        f"difference {100 * worst.apart:.1f} points ({worst.pair}, {worst.method}), that is "
        f"{worst.apart * prompts:.0f} of {prompts} prompts; over all rows {over_all[0]:+.2f} points of exact "
        f"match and {over_all[1]:+.2f} of F1; "
        f"{100 * (1 - fmean(score.same for score in found)):.1f} % of the answers differ at all."
    )


def verdicts_of(dtype: str, found: Sequence[Score], prompts: int) -> list[str]:
    """Over all rows, and over those with maps."""
    mapped = [score for score in found if score.mapped]
    return [verdict(dtype, found, prompts), verdict(f"{dtype}, plans with maps", mapped, prompts)]


def section(pairs: Sequence[str] = PAIRS) -> str:
    """The report's section about quality."""
    named = [(sender, receiver) for sender, _, receiver in (name.partition(":") for name in pairs)]
    found = {dtype: measure(named, dtype) for dtype in DTYPES}
    columns = ["pair", "method"]
    for dtype in DTYPES:
        columns += [f"{dtype}: exact match, vLLM", "transformers", "F1, vLLM", "transformers", "same answers"]
    rows = [
        [first.pair, first.method, *first.figures, *second.figures]
        for first, second in zip(*found.values(), strict=True)
    ]
    count = len(questions(named[0][1]))
    verdicts = "\n".join(f"- {told}" for dtype, of in found.items() for told in verdicts_of(dtype, of, count))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"""{TITLE}

Measured on {today}: {machine()}.

{count} held-out prompts of each receiver, chunks of {CHUNK}; sender and receiver through vLLM against sender
and receiver through the transformers door. The groups of 1 to {SIZES[-1]} layers are those that diverged
least on calibration prompts. `+emap` maps the E that a group starts from, `+kvmap` K and V of the layers that
are loaded, or of those that it names ([policies](../policy.md)). The maps (features: {FEATURES}) were fitted
on the prefixes of the calibration prompts in the same dtype, once for both doors. One prompt is
{100 / count:.1f} points of exact match: within {100 * TARGET} points means the same number of right answers.
In bfloat16 both engines round differently, and a prompt whose two best tokens are as good as equal may fall
either way; float32 tells that from a fault.

{table(columns, rows)}

{verdicts}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality through vLLM against the transformers door.")
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="SENDER:RECEIVER")
    parser.add_argument("--write", action="store_true", help="put the section into docs/benchmarks/vllm.md")
    parser.add_argument("--stage", choices=["send", "receive"], help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        job = json.loads(options.job)
        run_stage(options.stage, Job(job["folder"], job["model"], tuple(job["others"])))
        return
    text = section(options.pairs)
    print(text)
    if options.write:
        put_section(PAGE, "# vLLM", TITLE, text)


if __name__ == "__main__":
    main()
