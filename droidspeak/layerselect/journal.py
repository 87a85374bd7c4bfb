"""The journal of a profile: what was measured is kept, so that an interrupted profile goes on where it was.

FOLDER/job.json         what is being profiled; a folder of another job is emptied
FOLDER/results.jsonl    one result a line, by the task's key; a torn last line is dropped
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from droidspeak.errors import UsageError
from droidspeak.layerselect.tasks import Result, Task

__all__ = ["Journal", "Runner"]

Runner: TypeAlias = Callable[[Sequence[Task]], Iterable[tuple[Task, Result]]]
"""Measures tasks in any order, each result with its task."""


class Journal:
    """Keeps results in `folder`.

    Args:
        job: everything that results depend on besides the task: models, metric, versions.

    Attributes:
        resumed: results that were there from before.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self._results = folder / "results.jsonl"
        text = json.dumps(job, indent=1, sort_keys=True)
        try:
            if _read(folder / "job.json") != text:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / "job.json").write_text(text)
            self._known = dict(_parse(_read(self._results)))
            self._results.write_text("".join(_line(key, result) for key, result in self._known.items()))
        except OSError as error:
            raise UsageError(f"{folder}: {error.strerror}; the profile keeps its results there") from None
        self.resumed = len(self._known)

    def run(self, tasks: Sequence[Task], runner: Runner) -> Iterator[tuple[Task, Result]]:
        """The results of `tasks`; only those that are not known are measured, and kept as they come."""
        yield from ((task, self._known[task.key]) for task in tasks if task.key in self._known)
        unknown = [task for task in tasks if task.key not in self._known]
        if not unknown:
            return
        with self._results.open("a") as file:
            for task, result in runner(unknown):
                file.write(_line(task.key, result))
                file.flush()
                self._known[task.key] = result
                yield task, result

    def remove(self) -> None:
        """The profile is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _line(key: str, result: Result) -> str:
    return json.dumps({"key": key, **result.to_json()}) + "\n"


def _parse(text: str) -> Iterator[tuple[str, Result]]:
    for line in text.splitlines():
        try:
            content = json.loads(line)
            yield content.pop("key"), Result.from_json(content)
        except (ValueError, KeyError, TypeError):
            return
