"""Measure what reuse costs: ``python -m lab.evaluate [--pair SENDER RECEIVER ...]``.

For an ordered pair the sender prefills each document and keeps K, V and the input E
of every layer.  The receiver recomputes ``[s..L-1]`` from the sender's E of layer s
(from its own embedding where s is 0): the K, V of layers s to e of that one pass are
those of the group ``[s..e]``, so all L(L+1)/2 groups cost L partial prefills and one
short run of the questions each.  All in bfloat16, the precision that is shipped.

Exact match is that of greedy decoding: an answer counts when every word of it and the
closing ``</s>`` is the likeliest token after the right ones before it.

The best group of a size is chosen twice: by exact match on the held-out prompts
(``frontier``, hindsight, at its best) and by divergence from the receiver's full prefill
on the calibration prompts (``chosen``, what a profile could know), then measured held-out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from lab.train import LAB, NAMES
from lab.training import IGNORED

Group = tuple[int, int]
"""First and last recomputed layer, both included."""

FULL_REUSE: Final = None
CALIBRATION_DOCUMENTS: Final = 4
"""Sixteen prompts: enough to choose by divergence."""


@dataclass(frozen=True)
class Prefix:
    """State of one prefilled document.

    `keys` and `values` hold ``[1, key heads, tokens, size]`` per layer (keys rotated);
    `inputs` holds the E cache, ``[1, tokens, hidden]`` per layer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    inputs: list[Tensor]


@dataclass(frozen=True)
class Sheet:
    """The questions of one document, packed into one row that hides them from each other."""

    prefix: Tensor
    tokens: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor
    questions: int


@dataclass
class Outcome:
    """Results of one way to fill the cache, over all questions of a prompt file."""

    correct: list[bool] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)

    @property
    def exact_match(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def mean_divergence(self) -> float:
        return sum(self.divergence) / len(self.divergence)


def load_model(name: str, models: Path) -> LlamaForCausalLM:
    """Model `name` in bfloat16, ready to run."""
    model = LlamaForCausalLM.from_pretrained(models / name, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def load_sheets(path: Path, tokenizer: Any, limit: int | None = None) -> list[Sheet]:
    """One sheet for each document of a prompt file, or of its first `limit` documents."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sheets = [
        _sheet(prefix, list(group), tokenizer) for prefix, group in groupby(rows, lambda row: row["prefix"])
    ]
    return sheets[:limit]


def _sheet(prefix: str, rows: list[dict[str, str]], tokenizer: Any) -> Sheet:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    tokens: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    offsets: list[int] = []
    for owner, row in enumerate(rows):
        asked, answer = encode(row["question"]), [*encode(row["answer"]), tokenizer.eos_token_id]
        piece = asked + answer[:-1]
        tokens += piece
        labels += [IGNORED] * (len(asked) - 1) + answer
        owners += [owner] * len(piece)
        offsets += range(len(piece))
    prefix_ids = torch.tensor([encode(prefix)])
    length = prefix_ids.shape[1]
    return Sheet(
        prefix=prefix_ids,
        tokens=torch.tensor([tokens]),
        labels=torch.tensor(labels),
        mask=_block_mask(torch.tensor(owners), length),
        positions=length + torch.tensor([offsets]),
        questions=len(rows),
    )


def _block_mask(owners: Tensor, prefix_length: int) -> Tensor:
    """Additive mask ``[1, 1, words, prefix + words]``: the prefix and one's own earlier words."""
    order = torch.arange(len(owners))
    visible = (owners[:, None] == owners[None]) & (order[:, None] >= order[None])
    own = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, float("-inf"))
    return torch.cat([torch.zeros(len(owners), prefix_length, dtype=torch.bfloat16), own], 1)[None, None]


@torch.no_grad()
def run_layers(model: LlamaForCausalLM, hidden: Tensor, start: int) -> Prefix:
    """Run layers `start` to the last over a whole prefix; the lists hold those layers only."""
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    cache = DynamicCache(config=model.config)
    inputs = []
    for layer in model.model.layers[start:]:
        inputs.append(hidden)
        hidden = layer(hidden, position_ids=positions, past_key_values=cache, position_embeddings=rotary)
    filled = cache.layers[start:]
    return Prefix([one.keys for one in filled], [one.values for one in filled], inputs)


def prefill(model: LlamaForCausalLM, tokens: Tensor) -> Prefix:
    """Full prefill of a document."""
    return run_layers(model, model.model.embed_tokens(tokens), 0)


def mixed_prefixes(model: LlamaForCausalLM, tokens: Tensor, sent: Prefix) -> dict[Group | None, Prefix]:
    """The sender's prefix with each contiguous group of layers recomputed by `model`."""
    layers = model.config.num_hidden_layers
    mixed: dict[Group | None, Prefix] = {FULL_REUSE: sent}
    for start in range(layers):
        own = prefill(model, tokens) if start == 0 else run_layers(model, sent.inputs[start], start)
        for end in range(start, layers):
            count = end - start + 1
            keys = sent.keys[:start] + own.keys[:count] + sent.keys[end + 1 :]
            values = sent.values[:start] + own.values[:count] + sent.values[end + 1 :]
            mixed[start, end] = Prefix(keys, values, [])
    return mixed


@torch.no_grad()
def answer_logits(model: LlamaForCausalLM, sheet: Sheet, prefix: Prefix) -> Tensor:
    """Logits ``[words, vocabulary]`` of a sheet's questions over a prefilled prefix."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys, values, layer)
    output = model(
        input_ids=sheet.tokens,
        attention_mask=sheet.mask,
        position_ids=sheet.positions,
        past_key_values=cache,
    )
    logits: Tensor = output.logits
    return logits[0].float()


def correct_answers(logits: Tensor, sheet: Sheet) -> list[bool]:
    """For each question of the sheet whether its whole answer is right (`logits` ``[words, vocabulary]``)."""
    starts = (sheet.positions[0] == sheet.prefix.shape[1]).long()
    owners = starts.cumsum(0) - 1
    wrong = (logits.argmax(-1) != sheet.labels) & (sheet.labels != IGNORED)
    misses = torch.zeros(sheet.questions, dtype=torch.long).index_add(0, owners, wrong.long())
    return [count == 0 for count in misses.tolist()]


def _divergence(reference: Tensor, logits: Tensor, sheet: Sheet) -> float:
    """Mean KL divergence of the answer tokens from the reference, in nats."""
    answered = sheet.labels != IGNORED
    expected = reference[answered].log_softmax(-1)
    actual = logits[answered].log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1).mean().item()


def measure(
    sender: LlamaForCausalLM, receiver: LlamaForCausalLM, sheets: Sequence[Sheet]
) -> dict[Group | None, Outcome]:
    """Outcome of every group (and of full reuse, under `FULL_REUSE`) over some documents."""
    outcomes: dict[Group | None, Outcome] = {}
    for sheet in sheets:
        mixed = mixed_prefixes(receiver, sheet.prefix, prefill(sender, sheet.prefix))
        reference = answer_logits(receiver, sheet, prefill(receiver, sheet.prefix))
        for group, prefix in mixed.items():
            logits = answer_logits(receiver, sheet, prefix)
            outcome = outcomes.setdefault(group, Outcome())
            outcome.correct += correct_answers(logits, sheet)
            outcome.divergence.append(_divergence(reference, logits, sheet))
    return outcomes


def own_score(model: LlamaForCausalLM, sheets: Sequence[Sheet]) -> float:
    """Exact match of a model with its own full prefill."""
    correct: list[bool] = []
    for sheet in sheets:
        correct += correct_answers(answer_logits(model, sheet, prefill(model, sheet.prefix)), sheet)
    return sum(correct) / len(correct)


def _finding(group: Group, outcomes: dict[Group | None, Outcome]) -> dict[str, int | float]:
    return {"start": group[0], "end": group[1], "exact_match": round(outcomes[group].exact_match, 4)}


def frontier(outcomes: dict[Group | None, Outcome], layers: int) -> list[dict[str, int | float]]:
    """Best group of every size by exact match, ties by divergence."""
    best = []
    for size in range(1, layers + 1):
        groups = [(start, start + size - 1) for start in range(layers - size + 1)]
        winner = max(
            groups, key=lambda group: (outcomes[group].exact_match, -outcomes[group].mean_divergence)
        )
        best.append(_finding(winner, outcomes))
    return best


def chosen(
    calibration: dict[Group | None, Outcome], held_out: dict[Group | None, Outcome], layers: int
) -> list[dict[str, int | float]]:
    """Group of every size with the least divergence on `calibration`, measured on `held_out`."""
    picks = []
    for size in range(1, layers + 1):
        groups = [(start, start + size - 1) for start in range(layers - size + 1)]
        winner = min(groups, key=lambda group: calibration[group].mean_divergence)
        picks.append(_finding(winner, held_out))
    return picks


class Laboratory:
    """Loads each model and prompt file once."""

    def __init__(self, folder: Path, documents: int | None) -> None:
        self.folder = folder
        self._documents = documents
        self._models: dict[str, LlamaForCausalLM] = {}

    def model(self, name: str) -> LlamaForCausalLM:
        """Model `name`, loaded at the first call."""
        if name not in self._models:
            self._models[name] = load_model(name, self.folder / "models")
        return self._models[name]

    def sheets(self, receiver: str, suffix: str) -> list[Sheet]:
        """The prompts of a receiver: held-out (suffix ``""``) or ``".calibration"``."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "models" / receiver)
        return load_sheets(self.folder / "prompts" / f"{receiver}{suffix}.jsonl", tokenizer, self._documents)

    def finding(self, sender: str, receiver: str) -> dict[str, Any]:
        """One row of ``pairs.json``."""
        models = self.model(sender), self.model(receiver)
        sheets = self.sheets(receiver, "")
        held_out = measure(*models, sheets)
        calibration = measure(*models, self.sheets(receiver, ".calibration")[:CALIBRATION_DOCUMENTS])
        layers = self.model(receiver).config.num_hidden_layers
        return {
            "sender": sender,
            "receiver": receiver,
            "layers": layers,
            "prompts": sum(sheet.questions for sheet in sheets),
            "full_prefill": round(own_score(self.model(receiver), sheets), 4),
            "sender_alone": round(own_score(self.model(sender), sheets), 4),
            "full_reuse": round(held_out[FULL_REUSE].exact_match, 4),
            "frontier": frontier(held_out, layers),
            "chosen": chosen(calibration, held_out, layers),
        }


def table_row(finding: dict[str, Any]) -> str:
    """A Markdown row: the pair, its three references, then the best group of each size."""
    groups = [f"{one['exact_match']:.3f} [{one['start']}-{one['end']}]" for one in finding["frontier"]]
    references = [f"{finding[name]:.3f}" for name in ("full_prefill", "sender_alone", "full_reuse")]
    return " | ".join([f"| {finding['sender']} -> {finding['receiver']}", *references, *groups[:-1]]) + " |"


def table_head(layers: int) -> str:
    """Head of the table that `table_row` fills; the group of all layers is the full prefill."""
    sizes = [f"best of {size}" for size in range(1, layers)]
    names = ["sender -> receiver", "full prefill", "sender alone", "full reuse", *sizes]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.evaluate", description="Measure reuse between models."
    )
    parser.add_argument(
        "--pair", nargs=2, action="append", metavar=("SENDER", "RECEIVER"), help="only this pair"
    )
    parser.add_argument(
        "--folder", type=Path, default=LAB, help="folder with models/ and prompts/ (default: lab)"
    )
    parser.add_argument("--documents", type=int, help="use only the first so many documents of a prompt file")
    return parser.parse_args(argv)


def write_findings(path: Path, findings: Sequence[dict[str, Any]]) -> None:
    """Put `findings` into ``pairs.json``, in place of what it said about the same pairs."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = {(row["sender"], row["receiver"]): row for row in [*known, *findings]}
    path.write_text(json.dumps([rows[pair] for pair in sorted(rows)], indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; update ``pairs.json`` unless only some of the prompts were used."""
    arguments = _arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    every = [(sender, receiver) for receiver in NAMES for sender in NAMES if sender != receiver]
    laboratory = Laboratory(arguments.folder, arguments.documents)
    for number, (sender, receiver) in enumerate(arguments.pair or every):
        finding = laboratory.finding(sender, receiver)
        if number == 0:
            print(table_head(finding["layers"]), flush=True)
        print(table_row(finding), flush=True)
        if arguments.documents is None:
            write_findings(arguments.folder / "pairs.json", [finding])


if __name__ == "__main__":
    main()
