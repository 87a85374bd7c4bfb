"""What the demo asks of its processes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TIMING", "Task"]

TIMING = "timing:"
"""`timing:SEED` in place of a folder is a model of the timing part, with random weights."""


@dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
        sender, receiver: model folders, or `"timing:SEED"`.
        store: folder of the disk tier.
        plans: as `Plan.parse` reads them.
        prompts: prompt file, or `None` for one random prompt of `random_tokens`.
        policy: policy file whose plans, with its maps, are shown; or `None` for plans without maps.
        limit: use only the first prompts.
        repeats: answers to each prompt by each method.
    """

    sender: str
    receiver: str
    store: str
    plans: list[str]
    chunk_size: int
    prompts: str | None = None
    policy: str | None = None
    limit: int | None = None
    max_new_tokens: int = 8
    repeats: int = 1
    random_tokens: int = 2048
