"""Model, optimiser and training loop of the lab.

A run is a list of `Stage`s (a curriculum from short to long documents).  A stage
ends after its steps or as soon as the running accuracy passes `advance_at`; the
learning rate warms up once and decays over the last part of the whole run.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lab import vocabulary, world
from lab.attention import NAME as TRAINING_ATTENTION

IGNORED: Final = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True)
class Shape:
    """Size of the models; every variant has the shape of its base."""

    layers: int = 12
    hidden: int = 128
    heads: int = 4
    key_heads: int = 1
    feed_forward: int = 192
    rope_theta: float = 50_000.0
    positions: int = 2048


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: how long the documents are and when to go on."""

    persons: tuple[int, int]
    questions: int
    batch: int
    steps: int
    passage_words: int = 8
    advance_at: float = 2.0


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; `rate` is for the matrices, `other_rate` for the rest."""

    tasks: tuple[str, ...]
    stages: tuple[Stage, ...]
    total_steps: int
    rate: float
    other_rate: float
    muon: bool
    seed: int
    warm_up_steps: int = 50
    decay_fraction: float = 0.35
    weight_decay: float = 0.01
    look_back_steps: int = 0


def make_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A fresh model whose blocks start as the identity (zero output projections)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary.VOCABULARY_SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=vocabulary.TOKEN_IDS[vocabulary.PAD],
        bos_token_id=vocabulary.TOKEN_IDS[vocabulary.BOS],
        eos_token_id=vocabulary.TOKEN_IDS[vocabulary.EOS],
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def _orthogonalised(updates: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al., 2024) on a stack ``[n, rows, columns]``."""
    tall = updates.shape[1] > updates.shape[2]
    matrices: Tensor = updates.transpose(1, 2) if tall else updates
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = matrices @ matrices.transpose(1, 2)
        matrices = 3.4445 * matrices + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ matrices
    return matrices.transpose(1, 2) if tall else matrices


class Muon(torch.optim.Optimizer):
    """Muon, batched over matrices of one shape: few small products, cheap on a CPU."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(
                        (parameter, self._nesterov(parameter, group["momentum"]))
                    )
            for shape, pairs in by_shape.items():
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                self._update(pairs, scale, 1.0 - group["lr"] * group["weight_decay"])

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        average: Tensor = state.setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)

    @staticmethod
    def _update(pairs: Sequence[tuple[nn.Parameter, Tensor]], scale: float, shrink: float) -> None:
        updates = _orthogonalised(torch.stack([update for _, update in pairs]))
        for (parameter, _), update in zip(pairs, updates, strict=True):
            parameter.mul_(shrink).add_(update, alpha=-scale)


class LookBack(nn.Module):
    """Training-only heads on the output of layer 1 that name the two previous tokens.

    Attention heads that look one and two tokens back are the first half of a look-up
    circuit; asking for them directly makes them form in about a hundred steps.
    """

    DISTANCES: Final = 2

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        config = model.config
        self._hidden = config.hidden_size
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(self.DISTANCES)
        )
        self._output: Tensor | None = None
        self._hook = model.model.layers[1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def loss(self, tokens: Tensor) -> Tensor:
        """Sum of the cross entropies for distance one and two."""
        assert self._output is not None
        states = functional.rms_norm(self._output.float(), (self._hidden,))
        losses = [
            functional.cross_entropy(
                head(states[:, distance:]).flatten(0, 1), tokens[:, :-distance].flatten()
            )
            for distance, head in enumerate(self.heads, start=1)
        ]
        return torch.stack(losses).sum()

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()


def draw_batch(rng: random.Random, stage: Stage, tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and labels ``[batch, tokens]``; only answers (and their ``</s>``) carry labels."""
    persons = rng.randint(*stage.persons)
    rows = [_training_row(rng, stage, persons, tasks) for _ in range(stage.batch)]
    longest = max(len(tokens) for tokens, _ in rows)
    pad = vocabulary.TOKEN_IDS[vocabulary.PAD]
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows])
    return tokens, labels


def _training_row(
    rng: random.Random, stage: Stage, persons: int, tasks: Sequence[str]
) -> tuple[list[int], list[int]]:
    document = world.draw_document(rng, persons, stage.passage_words)
    tokens = vocabulary.encode(list(document.prefix))
    labels = [IGNORED] * len(tokens)
    for question in world.draw_questions(rng, document, tasks, stage.questions):
        asked = vocabulary.encode(list(question.question))
        answer = vocabulary.encode([*question.answer, vocabulary.EOS])
        tokens += asked + answer
        labels += [IGNORED] * len(asked) + answer
    return tokens, labels


def _optimisers(
    model: LlamaForCausalLM, recipe: Recipe
) -> tuple[list[torch.optim.Optimizer], list[nn.Parameter]]:
    """The optimisers and the parameters whose gradient is clipped (Muon needs no clipping)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    if not recipe.muon:
        every = matrices + others
        decay = recipe.weight_decay
        return [
            torch.optim.AdamW(every, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
        ], every
    muon = Muon(matrices, lr=recipe.rate, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adam], others


def rate_factor(recipe: Recipe, step: int) -> float:
    """Factor on the learning rates at `step` (from 0): warm-up, plateau, linear decay to 2 %."""
    warm_up = min(1.0, (step + 1) / recipe.warm_up_steps)
    left = 1.0 - step / recipe.total_steps
    return warm_up * min(1.0, max(0.02, left / recipe.decay_fraction))


@dataclass
class Progress:
    """Where a run stands; `accuracy` is a running mean over answer tokens."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    accuracy: float = 0.0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class Run:
    """One training run: ``Run(model, recipe).train()`` changes `model` in place."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.progress = Progress()
        self._rng = random.Random(recipe.seed)
        self._optimisers, self._clipped = _optimisers(model, recipe)
        self._look_back: LookBack | None = None
        if recipe.look_back_steps:
            torch.manual_seed(recipe.seed)
            self._look_back = LookBack(model)
            rate = recipe.other_rate
            self._optimisers.append(torch.optim.AdamW(self._look_back.parameters(), lr=rate, fused=True))
        self._rates = [[group["lr"] for group in one.param_groups] for one in self._optimisers]

    def train(self, report: Callable[[Progress], None], every: int = 50) -> Progress:
        """Train through all stages and call `report` every so many steps."""
        start = time.monotonic()
        self.model.set_attn_implementation(TRAINING_ATTENTION)
        self.model.train()
        for index, stage in enumerate(self.recipe.stages):
            self.progress.stage, self.progress.stage_step = index, 0
            while not self._finished(stage):
                self._step(stage)
                self.progress.seconds = time.monotonic() - start
                if self.progress.step % every == 0:
                    report(self.progress)
        if self._look_back is not None:
            self._look_back.remove()
        self.model.set_attn_implementation("sdpa")
        self.model.eval()
        return self.progress

    def _finished(self, stage: Stage) -> bool:
        progress = self.progress
        learned = progress.stage_step > 20 and progress.accuracy > stage.advance_at
        return learned or progress.stage_step >= stage.steps or progress.step >= self.recipe.total_steps

    def _step(self, stage: Stage) -> None:
        tokens, labels = draw_batch(self._rng, stage, self.recipe.tasks)
        self._set_rates(rate_factor(self.recipe, self.progress.step))
        logits, targets = self._answer_logits(tokens, labels)
        loss = functional.cross_entropy(logits, targets)
        total = loss
        if self._look_back is not None and self.progress.step < self.recipe.look_back_steps:
            total = loss + 0.3 * self._look_back.loss(tokens)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._clipped, 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self._record(loss, logits, targets, tokens.numel())

    def _set_rates(self, factor: float) -> None:
        for optimiser, rates in zip(self._optimisers, self._rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _answer_logits(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
            answered = labels[:, 1:] != IGNORED
            logits = self.model.lm_head(hidden[:, :-1][answered]).float()
        return logits, labels[:, 1:][answered]

    def _record(self, loss: Tensor, logits: Tensor, targets: Tensor, tokens: int) -> None:
        words = targets != vocabulary.TOKEN_IDS[vocabulary.EOS]
        accuracy = (logits.argmax(-1) == targets)[words].float().mean().item()
        progress = self.progress
        weight = 1.0 if progress.stage_step == 0 else 0.05
        progress.accuracy += weight * (accuracy - progress.accuracy)
        progress.loss = loss.item()
        progress.tokens += tokens
        progress.step += 1
        progress.stage_step += 1
