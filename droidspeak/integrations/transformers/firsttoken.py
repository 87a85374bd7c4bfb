"""When `model.generate` had its first token."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

__all__ = ["FirstToken"]


class FirstToken(StoppingCriteria):  # type: ignore[misc]
    """Asked after every token whether to stop, says no, and remembers when it was asked first.

    Attributes:
        at: on `time.perf_counter`'s clock; 0 before.
    """

    def __init__(self) -> None:
        self.at = 0.0

    def beside(self, others: Iterable[Any] | None) -> StoppingCriteriaList:
        """Itself, after the caller's own criteria."""
        return StoppingCriteriaList([*(others or ()), self])

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_options: Any) -> torch.Tensor:  # noqa: ARG002
        self.at = self.at or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
