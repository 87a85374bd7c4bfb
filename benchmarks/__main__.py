"""Runs the benchmarks and writes `docs/benchmarks/foundation.md`."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from benchmarks import codec, storage, ttft
from benchmarks.measure import machine

_PARTS = {"storage": storage.run, "ttft": ttft.run, "codec": codec.run}
_REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "foundation.md"


def main(names: list[str]) -> None:
    """Prints the named parts (all by default); a run of all is written to the report."""
    unknown = set(names) - set(_PARTS)
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; allowed: {', '.join(_PARTS)}")
    sections = []
    for name in names or _PARTS:
        sections.append(_PARTS[name]())
        print(sections[-1] + "\n", flush=True)
    if not names:
        today = datetime.datetime.now(tz=datetime.UTC).date()
        head = (
            f"# Foundation\n\nMade by `make bench` on {today}: {machine()}.\nTimes are medians of one run in "
            "which all methods take turns, with their minimum and maximum; a ratio is the median of the "
            "rounds' ratios.\n"
        )
        _REPORT.write_text("\n".join([head, *(section + "\n" for section in sections)]))


if __name__ == "__main__":
    main(sys.argv[1:])
