"""What a model says after cached prefixes, and how far a cache leads it astray; many rows in few forwards.

A row is a suffix and the K and V of every layer of its prefix. Rows of one batch share the prefix's length;
shorter suffixes are padded on the right, where causal attention keeps what is read from seeing it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV, BatchPlan, past_key_values, stack

__all__ = ["Row", "agreement", "divergence", "greedy", "teacher_forced"]

_BATCH_BYTES = 256 << 20
_PAD = 0


@dataclass(frozen=True)
class Row:
    """Suffix token ids (at least one) over K and V of every layer, `[tokens, kv_heads, head_dim]`."""

    layers: Sequence[KV]
    suffix: tuple[int, ...]


def teacher_forced(decoder: Decoder, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """Per row the logits of its answer's tokens, each after the ones before it: `[answer, vocab]` float32."""
    found: list[Tensor] = []
    for batch in _batches(rows):
        answered = answers[len(found) : len(found) + len(batch)]
        suffixes = [(*row.suffix, *answer[:-1]) for row, answer in zip(batch, answered, strict=True)]
        # Questions may be long and vocabularies large: logits are made from the first answer's on.
        skipped = min(len(row.suffix) for row in batch) - 1
        logits = _forward(decoder, batch, suffixes, skipped)
        for n, (row, answer) in enumerate(zip(batch, answered, strict=True)):
            first = len(row.suffix) - 1 - skipped
            found.append(logits[n, first : first + len(answer)].float())
    return found


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean KL divergence of `logits` from `reference`, both `[answer, vocab]`, in nats."""
    expected, actual = reference.log_softmax(-1), logits.log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1).mean().clamp(min=0).item()


def agreement(reference: Tensor, logits: Tensor) -> float:
    """Share of tokens at which both `[answer, vocab]` say the same."""
    return (reference.argmax(-1) == logits.argmax(-1)).float().mean().item()


def greedy(
    decoder: Decoder, rows: Sequence[Row], *, max_new_tokens: int, eos_ids: Collection[int]
) -> list[tuple[int, ...]]:
    """Per row its greedy answer, with the token that ended it, if one did."""
    answers: dict[int, tuple[int, ...]] = {}
    by_length: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        by_length.setdefault(len(row.suffix), []).append(n)
    for members in by_length.values():
        said = [
            _greedy(decoder, batch, max_new_tokens, eos_ids) for batch in _batches([rows[n] for n in members])
        ]
        answers |= dict(zip(members, (answer for batch in said for answer in batch), strict=True))
    return [answers[n] for n in range(len(rows))]


def _greedy(
    decoder: Decoder, rows: Sequence[Row], max_new_tokens: int, eos_ids: Collection[int]
) -> list[tuple[int, ...]]:
    """Of rows whose suffixes are of one length."""
    cache = _stacked(decoder, rows)
    step = torch.tensor([row.suffix for row in rows], device=decoder.device)
    said: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            output = decoder.model(input_ids=step, past_key_values=cache, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1)
            for n in list(going):
                said[n].append(int(tokens[n]))
                if said[n][-1] in eos_ids:
                    going.remove(n)
            if not going:
                break
            step = tokens[:, None]
    return [tuple(answer) for answer in said]


def _forward(
    decoder: Decoder, rows: Sequence[Row], suffixes: Sequence[tuple[int, ...]], skipped: int
) -> Tensor:
    """Logits `[rows, columns less skipped, vocab]`."""
    width = max(map(len, suffixes))
    ids = torch.tensor([[*suffix, *([_PAD] * (width - len(suffix)))] for suffix in suffixes])
    cache = _stacked(decoder, rows)
    with torch.no_grad():
        output = decoder.model(
            input_ids=ids.to(decoder.device), past_key_values=cache, logits_to_keep=width - skipped
        )
    logits: Tensor = output.logits
    return logits


def _stacked(decoder: Decoder, rows: Sequence[Row]) -> DynamicCache:
    """One cache of all rows; a single row's is not copied."""
    if len(rows) == 1:
        return past_key_values(decoder.config, rows[0].layers)
    tokens = rows[0].layers[0][0].shape[0]
    return stack(decoder.config, [row.layers for row in rows], BatchPlan(tokens, (tokens,) * len(rows)))


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows in order, as many at a time as fit `_BATCH_BYTES`, at least one."""
    if not rows:
        return
    nbytes = sum(k.nbytes + v.nbytes for k, v in rows[0].layers)
    count = max(1, _BATCH_BYTES // max(1, nbytes))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]
