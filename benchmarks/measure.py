"""Timing calls side by side, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Series", "interleaved", "machine", "put_section", "table"]


@dataclass(frozen=True)
class Series:
    """Seconds of one call, over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def spread(self, scale: float = 1e3, digits: int = 1) -> str:
        """`median (min-max)`, in milliseconds unless scaled otherwise."""
        low, high = min(self.seconds) * scale, max(self.seconds) * scale
        return f"{self.median * scale:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"

    def rate(self, nbytes: int) -> str:
        """GB/s at the median."""
        return f"{nbytes / self.median / 1e9:.2f}"

    def ratio(self, other: Series) -> float:
        """Median over rounds of other's time by ours: above 1 we are faster."""
        return statistics.median(
            theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, Series]:
    """Runs the calls in turn, A B C A B C ..., and times each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Series(tuple(values)) for name, values in seconds.items()}


def machine() -> str:
    """One line about where the figures come from."""
    import torch  # not above: the clients of a server are forked before it is there

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, Python {platform.python_version()}, Linux {platform.release().split('-')[0]}"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def put_section(page: Path, heading: str, title: str, section: str) -> None:
    """Puts the section that begins with `title` at the end of the page, in the place of an older one.

    Args:
        heading: what a page begins with that is not there yet.
    """
    text = page.read_text() if page.exists() else f"{heading}\n"
    others = re.sub(rf"\n{re.escape(title)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    page.write_text(f"{others.rstrip()}\n\n{section}")
