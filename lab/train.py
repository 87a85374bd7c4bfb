"""Train the lab's models: ``python -m lab.train [--only NAME ...] [--out DIR] [--seed N]``.

The base is trained first; every variant is a full fine-tune of the base in the same
output folder.  Each model becomes an ordinary transformers folder (bfloat16) under
``DIR/models`` and two prompt files under ``DIR/prompts``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaForCausalLM

from lab import vocabulary, world
from lab.training import Progress, Recipe, Run, Shape, Stage, make_model

BASE: Final = "base"
NAMES: Final = tuple(world.VARIANT_TASKS)
LAB: Final = Path(__file__).parent

BASE_STAGES: Final = (
    Stage(persons=(2, 2), questions=8, batch=24, steps=10_000, passage_words=5, advance_at=0.7),
    Stage(persons=(3, 5), questions=16, batch=12, steps=10_000, passage_words=6, advance_at=0.8),
    Stage(persons=(5, 9), questions=24, batch=8, steps=10_000, advance_at=0.9),
    Stage(persons=(8, 16), questions=30, batch=6, steps=10_000, advance_at=0.95),
    Stage(persons=(14, 32), questions=48, batch=3, steps=10_000, advance_at=0.95),
    Stage(persons=(28, 64), questions=64, batch=2, steps=10_000),
)
BASE_STEPS: Final = 1200

VARIANT_STAGES: Final = (
    Stage(persons=(3, 6), questions=16, batch=12, steps=250, passage_words=6, advance_at=0.85),
    Stage(persons=(6, 14), questions=30, batch=6, steps=120, advance_at=0.93),
    Stage(persons=(14, 32), questions=64, batch=3, steps=80, advance_at=0.95),
    Stage(persons=(28, 64), questions=96, batch=2, steps=10_000),
)
VARIANT_STEPS: Final = {"coder": 500, "inverse": 500, "mixed": 160, "analyst": 600}
MUON_VARIANTS: Final = ("coder", "inverse")
"""Variants whose tasks need new circuits; the others are fine-tuned with AdamW."""

PROMPT_PERSONS: Final = (40, 64)
"""Range of persons in the documents of the prompt files: prefixes of 530 to 842 tokens."""

PROMPT_FILES: Final = {"": (12, 8), ".calibration": (8, 4)}
"""Documents and questions per document of the two prompt files, by the suffix of their names."""


def recipe(name: str, seed: int) -> Recipe:
    """How model `name` is trained; `seed` shifts the seeds of all of them."""
    tasks = world.VARIANT_TASKS[name]
    own_seed = 1000 * seed + NAMES.index(name)
    if name == BASE:
        return Recipe(
            tasks, BASE_STAGES, BASE_STEPS, 0.02, 4e-3, muon=True, seed=own_seed, look_back_steps=400
        )
    muon = name in MUON_VARIANTS
    rate, other_rate = (0.015, 3e-3) if muon else (1e-3, 1e-3)
    return Recipe(
        tasks, VARIANT_STAGES, VARIANT_STEPS[name], rate, other_rate, muon, own_seed, warm_up_steps=20
    )


def train(name: str, seed: int, out: Path) -> None:
    """Train model `name` and write its folder; a variant needs the base to be there."""
    model = _starting_point(name, seed, out)
    progress = Run(model, recipe(name, seed)).train(lambda at: _report(name, at))
    print(
        f"{name}: done, {progress.step} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s",
        flush=True,
    )
    save(model, out / "models" / name)


def _starting_point(name: str, seed: int, out: Path) -> LlamaForCausalLM:
    if name == BASE:
        return make_model(Shape(), seed)
    model = LlamaForCausalLM.from_pretrained(out / "models" / BASE, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


def _report(name: str, at: Progress) -> None:
    print(
        f"{name}: step {at.step:4d} stage {at.stage} loss {at.loss:.3f} accuracy {at.accuracy:.3f} "
        f"{at.tokens / 1e6:.2f}M tokens {at.seconds:.0f} s",
        flush=True,
    )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer into `folder`."""
    model.to(torch.bfloat16).save_pretrained(folder)
    vocabulary.save_tokenizer(folder)


def prompt_rows(name: str, suffix: str, seed: int) -> Iterator[dict[str, str]]:
    """Rows of one prompt file: several questions about each document.

    The files of all models draw from different seeds, and training draws from others
    again, so no two of them share a document.
    """
    rng = random.Random(f"{seed}/{name}/prompts{suffix}")
    documents, questions_each = PROMPT_FILES[suffix]
    for number in range(documents):
        document = world.draw_document(rng, rng.randint(*PROMPT_PERSONS), passage_words=8)
        questions = world.draw_questions(rng, document, world.VARIANT_TASKS[name], questions_each)
        for position, question in enumerate(questions):
            yield {
                "id": f"{name}{suffix}-{number:02d}-{position}",
                "task": question.task,
                "prefix": " ".join(document.prefix),
                "question": " ".join(question.question),
                "answer": " ".join(question.answer),
            }


def write_prompts(name: str, seed: int, out: Path) -> None:
    """Write ``NAME.jsonl`` (held-out) and ``NAME.calibration.jsonl``."""
    folder = out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in PROMPT_FILES:
        lines = [json.dumps(row) + "\n" for row in prompt_rows(name, suffix, seed)]
        (folder / f"{name}{suffix}.jsonl").write_text("".join(lines), encoding="utf-8")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.train", description="Train the lab's models.")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="train only these"
    )
    parser.add_argument(
        "--out", type=Path, default=LAB, help="folder for models/ and prompts/ (default: lab)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, training data and prompts")
    parser.add_argument(
        "--prompts-only", action="store_true", help="write the prompt files and train nothing"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what the command line asks for, the base first."""
    arguments = _arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in (name for name in NAMES if name in arguments.only):
        write_prompts(name, arguments.seed, arguments.out)
        if not arguments.prompts_only:
            train(name, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
