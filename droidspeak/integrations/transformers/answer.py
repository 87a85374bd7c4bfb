"""Answering prompts one at a time, greedily, and timing the first token."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from droidspeak.connector import Outcome
from droidspeak.errors import PromptError
from droidspeak.integrations.transformers.door import DroidSpeak
from droidspeak.prompts import Prompt
from droidspeak.storage import SourceManifest

__all__ = ["Answer", "PromptEncoder", "answer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        token_ids: generated tokens, without the one that ended the answer.
        ttft: seconds from the request to its first token.
    """

    token_ids: tuple[int, ...]
    ttft: float
    outcome: Outcome


class PromptEncoder:
    """Turns prompts into token ids and answers into comparable units.

    Args:
        folder: the model's; a folder without a tokenizer takes token ids only.
        vocab_size: token ids must lie below it.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        has_one = any((folder / name).is_file() for name in _TOKENIZER_FILES)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder) if has_one else None

    def encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of the prefix, and of the question after it.

        Raises:
            PromptError: a text for a folder without a tokenizer, or ids outside of the vocabulary.
        """
        prefix = self._ids(prompt, prompt.prefix, special=True)
        return prefix, self._ids(prompt, prompt.question, special=False)

    def units(self, token_ids: Sequence[int]) -> list[Any]:
        """What measures compare: words of the decoded text, or token ids without a tokenizer."""
        if self._tokenizer is None:
            return list(token_ids)
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return list(text.split())

    def expected(self, prompt: Prompt) -> list[Any]:
        """The units of the right answer."""
        return prompt.answer.split() if isinstance(prompt.answer, str) else list(prompt.answer)

    def _ids(self, prompt: Prompt, part: str | tuple[int, ...], *, special: bool) -> list[int]:
        if not isinstance(part, str):
            ids = list(part)
        elif self._tokenizer is None:
            raise PromptError(f"prompt {prompt.id}: {self._folder} has no tokenizer; allowed are token ids")
        else:
            ids = list(self._tokenizer.encode(part, add_special_tokens=special))
        if ids and max(ids) >= self._vocab_size:
            raise PromptError(
                f"prompt {prompt.id}: token id {max(ids)}; allowed are 0-{self._vocab_size - 1}"
            )
        return ids


def answer(
    droid: DroidSpeak,
    token_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    sender: SourceManifest | None = None,
    share: bool = True,
) -> Answer:
    """Greedy answer to one whole prompt, at most `max_new_tokens` tokens.

    `sender` and `share` are those of `DroidSpeak.prefill`.
    """
    started = time.perf_counter()
    ids = torch.tensor(token_ids, device=droid.decoder.device)
    prefix = droid.prefill(ids, sender=sender, share=share)
    cache = prefix.past_key_values
    said: list[int] = []
    step = ids[None, prefix.tokens :]
    ttft = 0.0
    with torch.no_grad():
        for n in range(max_new_tokens):
            logits = droid.model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if n == 0:
                ttft = time.perf_counter() - started
                droid.record_ttft(prefix.outcome, ttft)
            if token in eos_ids:
                break
            said.append(token)
            step = torch.tensor([[token]], device=ids.device)
    return Answer(tuple(said), ttft, prefix.outcome)
