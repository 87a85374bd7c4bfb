"""The harness: measures methods of filling a prefix's cache against the receiver's own full prefill.

    reference   full prefill of the prefix; greedy answer to each question; the logits of its tokens
    method      its cache (`mixing`); the reference answer teacher-forced over it -> divergence, agreement
                where all tokens agree the greedy answer is the reference's; else it is generated
    score       task metric of the answer against the right one, divergence, agreement

Baselines run through the same code as plans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from droidspeak.errors import PromptError, UsageError
from droidspeak.integrations.transformers.answer import PromptEncoder
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.loading import eos_ids, load_model
from droidspeak.integrations.transformers.mixing import Mixed, Mixer
from droidspeak.integrations.transformers.rows import (
    Row,
    agreement,
    divergence,
    greedy,
    teacher_forced,
)
from droidspeak.layerselect import MapFile, Method, Score
from droidspeak.layerselect.mapping import Maps
from droidspeak.layerselect.methods import parse_method
from droidspeak.layerselect.metrics import get_metric
from droidspeak.layerselect.tasks import SENDER_ALONE, Question, Result, Task, Unit
from droidspeak.prompts import Prompt

__all__ = ["Bench", "BenchSpec", "encode_units"]


@dataclass(frozen=True)
class BenchSpec:
    """What a worker process needs to build its `Bench`.

    Attributes:
        threads: torch's choice if `None`.
        device: where both models go, such as `"cuda"`.
    """

    sender: Path
    receiver: Path
    metric: str
    max_new_tokens: int
    threads: int | None = None
    device: str = "cpu"


class Bench:
    """Sender and receiver, loaded, and the metric: measures tasks one after the other."""

    def __init__(self, spec: BenchSpec) -> None:
        """Raises `UsageError` for folders that hold no models, and for an unknown metric."""
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.sender, self.receiver = (
            Decoder(load_model(side, spec.device)) for side in (spec.sender, spec.receiver)
        )
        self._metric, self._max_new_tokens = get_metric(spec.metric), spec.max_new_tokens
        self._eos_ids = eos_ids(self.receiver.model)
        self._encoder = PromptEncoder(spec.receiver, self.receiver.model.config.vocab_size)
        self._maps: tuple[MapFile, Maps] | None = None

    def run(self, task: Task) -> Result:
        """Measures `task`.

        Raises:
            UsageError: logits that are not finite, a plan that does not fit, maps that cannot be used.
        """
        layers = self.receiver.num_layers
        methods = [parse_method(text, layers) for text in task.methods]
        ids = torch.tensor(task.unit.prefix, device=self.receiver.device)
        mixer = Mixer(self.sender, self.receiver, ids, methods, self._load_maps(task.maps))
        reference = self._reference(mixer, task.unit)
        scores: dict[str, dict[str, Score]] = {}
        for batch in mixer.mixed():
            scores |= self._score(batch, task, reference)
        if task.sender_alone:
            scores[SENDER_ALONE] = self._sender_alone(mixer, task.unit)
        return Result(
            scores, mixer.runs, mixer.timings, mixer.map_timings, [self._time_suffix(mixer, task.unit)]
        )

    def _time_suffix(self, mixer: Mixer, unit: Unit) -> float:
        started = time.perf_counter()
        teacher_forced(self.receiver, [Row(mixer.own.layers, unit.questions[0].suffix)], [(0,)])
        return time.perf_counter() - started

    def _reference(self, mixer: Mixer, unit: Unit) -> list[_Reference]:
        rows = [Row(mixer.own.layers, question.suffix) for question in unit.questions]
        answers = self._greedy(self.receiver, rows)
        logits = teacher_forced(self.receiver, rows, answers)
        for question, own in zip(unit.questions, logits, strict=True):
            _require_finite(own, question.id, "full prefill")
        return [_Reference(answer, own) for answer, own in zip(answers, logits, strict=True)]

    def _score(
        self, batch: Sequence[Mixed], task: Task, reference: Sequence[_Reference]
    ) -> dict[str, dict[str, Score]]:
        pairs = [(method, question) for method, _ in batch for question in task.unit.questions]
        rows = [Row(layers, question.suffix) for _, layers in batch for question in task.unit.questions]
        references = list(reference) * len(batch)
        forced = teacher_forced(self.receiver, rows, [own.answer for own in references])
        for (method, question), logits in zip(pairs, forced, strict=True):
            _require_finite(logits, question.id, str(method))
        agreements = [agreement(own.logits, logits) for own, logits in zip(references, forced, strict=True)]
        divergences = [divergence(own.logits, logits) for own, logits in zip(references, forced, strict=True)]
        qualities = [math.exp(-kl) for kl in divergences]
        if task.generate and self._metric is not None:
            qualities = self._qualities(pairs, rows, references, agreements)
        scores: dict[str, dict[str, Score]] = {str(method): {} for method, _ in batch}
        for (method, question), *score in zip(pairs, qualities, divergences, agreements, strict=True):
            scores[str(method)][question.id] = Score(*score)
        return scores

    def _qualities(
        self,
        pairs: Sequence[tuple[Method, Question]],
        rows: Sequence[Row],
        references: Sequence[_Reference],
        agreements: Sequence[float],
    ) -> list[float]:
        answers = [own.answer for own in references]
        differing = [n for n, share in enumerate(agreements) if share < 1]
        said = self._greedy(self.receiver, [rows[n] for n in differing])
        for n, answer in zip(differing, said, strict=True):
            answers[n] = answer
        return [self._quality(answer, question) for answer, (_, question) in zip(answers, pairs, strict=True)]

    def _quality(self, answer: Sequence[int], question: Question) -> float:
        assert self._metric is not None
        words = [token for token in answer if token not in self._eos_ids]
        return self._metric(self._encoder.units(words), question.expected)

    def _sender_alone(self, mixer: Mixer, unit: Unit) -> dict[str, Score]:
        """The task metric of the sender itself; with `kl` there is none, and it counts 0."""
        if self._metric is None:
            return {question.id: Score(0.0, 0.0, 0.0) for question in unit.questions}
        rows = [Row(mixer.sent.layers, question.suffix) for question in unit.questions]
        answers = self._greedy(self.sender, rows)
        return {
            question.id: Score(self._quality(answer, question), 0.0, 0.0)
            for question, answer in zip(unit.questions, answers, strict=True)
        }

    def _greedy(self, decoder: Decoder, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        return greedy(decoder, rows, max_new_tokens=self._max_new_tokens, eos_ids=self._eos_ids)

    def _load_maps(self, file: MapFile | None) -> Maps | None:
        if file is None:
            return None
        if self._maps is None or self._maps[0] != file:
            self._maps = file, Maps.load(file).to(self.receiver.device)
        return self._maps[1]


@dataclass(frozen=True)
class _Reference:
    """The receiver's own answer to one question, and the logits of its tokens, `[answer, vocab]`."""

    answer: tuple[int, ...]
    logits: Tensor


def _require_finite(logits: Tensor, prompt: str, method: str) -> None:
    if not logits.isfinite().all():
        raise UsageError(f"prompt {prompt}, {method}: logits are not finite; the models cannot be profiled")


def encode_units(prompts: Sequence[Prompt], encoder: PromptEncoder, *, max_tokens: int) -> list[Unit]:
    """Prompts as units, those of one prefix together, in the order of the file.

    Args:
        max_tokens: context of the model, less what an answer may take.

    Raises:
        PromptError: a prompt that is too long or has no tokens, or that the encoder refuses.
    """
    by_prefix: dict[tuple[int, ...], list[Question]] = {}
    for prompt in prompts:
        prefix, suffix = encoder.encode(prompt)
        if not prefix or not suffix:
            raise PromptError(f"prompt {prompt.id}: prefix and question must each make at least one token")
        if len(prefix) + len(suffix) > max_tokens:
            raise PromptError(
                f"prompt {prompt.id} has {len(prefix) + len(suffix)} tokens; the model's context leaves "
                f"room for {max_tokens}"
            )
        question = Question(prompt.id, tuple(suffix), tuple(encoder.expected(prompt)))
        by_prefix.setdefault(tuple(prefix), []).append(question)
    return [Unit(prefix, tuple(questions)) for prefix, questions in by_prefix.items()]
