"""The journal: nothing is measured twice, whatever ends the process."""

from __future__ import annotations

import json

import pytest

from droidspeak.errors import UsageError
from droidspeak.layerselect import MapFile, Score
from droidspeak.layerselect.journal import Journal
from droidspeak.layerselect.tasks import Question, Result, Task, Timing, Unit

JOB = {"sender": "a", "receiver": "b"}


def task(n: int, **changes) -> Task:
    unit = Unit((n, n + 1), (Question(f"q{n}", (3,), ("x", 4)),))
    return Task(**{"unit": unit, "methods": ("reuse", "0-1"), **changes})


def result(n: int) -> Result:
    score = Score(0.5, 0.1 * n, 1.0)
    return Result({"reuse": {f"q{n}": score}}, [(2, 7)], [Timing(1, 2, 0.5)], [Timing(1, 2, 0.1)], [0.01])


class Runner:
    """Notes what it measured; stops after `limit`, as an interruption would."""

    def __init__(self, limit: int = 99) -> None:
        self.done: list[Task] = []
        self.limit = limit

    def __call__(self, tasks):
        for one in tasks:
            if len(self.done) == self.limit:
                raise KeyboardInterrupt
            self.done.append(one)
            yield one, result(one.unit.prefix[0])


def test_an_interrupted_job_goes_on_where_it_was(tmp_path):
    tasks = [task(n) for n in range(5)]
    with pytest.raises(KeyboardInterrupt):
        dict(Journal(tmp_path / "job", JOB).run(tasks, Runner(limit=3)))
    again, runner = Journal(tmp_path / "job", JOB), Runner()
    assert again.resumed == 3
    results = dict(again.run(tasks, runner))
    assert runner.done == tasks[3:]
    assert results == {one: result(one.unit.prefix[0]) for one in tasks}


def test_a_torn_line_is_measured_again(tmp_path):
    tasks = [task(n) for n in range(3)]
    dict(Journal(tmp_path, JOB).run(tasks, Runner()))
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text()[:-20])
    again, runner = Journal(tmp_path, JOB), Runner()
    assert again.resumed == 2
    dict(again.run(tasks, runner))
    assert runner.done == tasks[2:]
    assert Journal(tmp_path, JOB).resumed == 3


def test_results_of_another_job_are_not_taken(tmp_path):
    dict(Journal(tmp_path, JOB).run([task(0)], Runner()))
    (tmp_path / "maps-linear.safetensors").write_bytes(b"old")
    other = Journal(tmp_path, {**JOB, "sender": "c"})
    assert other.resumed == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "results.jsonl"]


def test_a_task_is_known_by_all_that_its_result_depends_on(tmp_path):
    maps = MapFile(tmp_path / "a", "0" * 64)
    different = [
        task(0),
        task(1),
        task(0, methods=("reuse",)),
        task(0, generate=False),
        task(0, sender_alone=True),
        task(0, maps=maps),
        task(0, maps=MapFile(tmp_path / "a", "1" * 64)),
    ]
    assert len({one.key for one in different}) == len(different)
    assert task(0, maps=MapFile(tmp_path / "b", "0" * 64)).key == task(0, maps=maps).key


def test_results_survive_json():
    assert Result.from_json(json.loads(json.dumps(result(3).to_json()))) == result(3)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="keeps its results there") as caught:
        Journal(tmp_path / "file" / "job", JOB)
    assert "\n" not in str(caught.value)
    Journal(tmp_path / "job", JOB).remove()
    assert not (tmp_path / "job").exists()
