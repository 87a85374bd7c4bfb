"""docs/cli-json.md: each section's example has the keys and the types of what the command really prints.

To add a command:

1. Give it a section in the page: the heading is `## ` and the command's words, and the first block of
   json behind it is an example of `--format json`. `null` stands for any type.
2. Give it a row in `CALLS`: the words of a call that shows at least one row in each list (but those of
   `MAY_BE_EMPTY`). `{store}` is the URL of the store that `tests/cli/shelf.py` fills, `{place}` an empty
   folder. Objects whose keys are data, not names, are in `BY_NAME`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from droidspeak.integrations.cli.main import _COMMANDS
from tests.cli.commandline import call
from tests.cli.shelf import KEY, Shelf, shelf

PAGE = Path(__file__).parents[2] / "docs" / "cli-json.md"
_SECTION = re.compile(r"^## ([a-z -]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^```json\n(.*?)^```", re.MULTILINE | re.DOTALL)

CALLS: dict[str, str] = {
    "config check": "",
    "config show": "",
    "doctor": "",
    "store copy": "{store} disk://{place}/to",
    "store df": "-v --store {store}",
    "store export": "{place}/chunks.tar --store {store}",
    "store import": "{place}/shelf.tar --store disk://{place}/to",
    "store ls": "--limit 2 --store {store}",
    "store pin": f"{KEY} --store {{store}}",
    "store prune": "--older-than 0s --dry-run --store {store}",
    "store purge": f"--source {KEY.source} -y --store {{store}}",
    "store rm": f"{KEY} --store {{store}}",
    "store shared": "--store {store}",
    "store show": f"{KEY} --store {{store}}",
    "store stats": "--store {store}",
    "store top": "--by hits --limit 1 --store {store}",
    "store unpin": f"{KEY} --store {{store}}",
    "store verify": "--store {store}",
}
# What happens before the call.
BEFORE = {
    "store import": lambda shelf: call("store", "export", shelf.place / "shelf.tar", "--store", shelf.store),
    "store verify": lambda shelf: shelf.damage(),
}
# What a machine's doctor finds is another matter.
STATUSES = {"store verify": {3}, "doctor": {0, 3}}
MAY_BE_EMPTY = {"failed", "loads"}
# Paths of objects whose keys are data.
BY_NAME = {
    "store show": {"labels"},
    "store stats": {"requests", "reasons", "lookups", "events", "daemons"},
}

__all__ = ["shelf"]


def sections() -> dict[str, str]:
    return dict(_SECTION.findall(PAGE.read_text()))


def example(command: str) -> Any:
    found = _EXAMPLE.search(sections()[command])
    assert found, f"no example of {command}"
    return json.loads(found[1])


def differences(told: Any, shown: Any, by_name: set[str], place: str = "") -> list[str]:
    """Where `told`, of the page, and `shown`, by the command, have other keys or types."""
    if told is None or shown is None:
        return []
    if isinstance(told, dict) and isinstance(shown, dict):
        if place in by_name:
            values = [(next(iter(told.values())), value) for value in shown.values() if told]
            return [line for pair in values for line in differences(*pair, by_name, f"{place}.*")]
        lacking = sorted(told.keys() ^ shown.keys())
        missing = [f"{place or 'document'}: {key} only on one side" for key in lacking]
        pairs = [(key, told[key], shown[key]) for key in told.keys() & shown.keys()]
        parts = [differences(one, other, by_name, f"{place}.{key}".lstrip(".")) for key, one, other in pairs]
        return missing + [line for part in parts for line in part]
    if isinstance(told, list) and isinstance(shown, list):
        assert told or not shown, f"{place}: the example has no row"
        return [line for row in shown for line in differences(told[0], row, by_name, f"{place}[]")]
    if type(told) is type(shown) or (isinstance(told, float) and type(shown) is int):
        return []
    return [f"{place}: {told!r} is no {type(shown).__name__} as {shown!r} is"]


@pytest.mark.parametrize("command", CALLS)
def test_the_page_tells_what_the_command_prints(shelf: Shelf, command: str) -> None:
    words = CALLS[command].format(store=shelf.store, place=shelf.place).split()
    BEFORE.get(command, lambda _: None)(shelf)
    done = call(*command.split(), *words, "--format", "json")
    assert done.returncode in STATUSES.get(command, {0}), done.stderr
    shown = json.loads(done.stdout)
    assert shown["version"] == 1
    empty = [name for name, value in shown.items() if value == [] and name not in MAY_BE_EMPTY]
    assert not empty, f"the call shows no row of {empty}"
    assert differences(example(command), shown, BY_NAME.get(command, set())) == []


def test_every_command_of_the_store_has_a_section() -> None:
    group = _COMMANDS["store"]
    assert isinstance(group, Mapping)
    assert {f"store {name}" for name in group} <= sections().keys()
    assert sections().keys() == CALLS.keys()


@pytest.mark.parametrize(
    ("told", "shown", "found"),
    [
        ({"a": 1}, {"a": 2}, []),
        ({"a": 1}, {"b": 2}, ["document: a only on one side", "document: b only on one side"]),
        ({"a": 1}, {"a": "1"}, ["a: 1 is no str as '1' is"]),
        ({"a": 1}, {"a": True}, ["a: 1 is no bool as True is"]),
        ({"a": 1}, {"a": 1.5}, ["a: 1 is no float as 1.5 is"]),
        ({"a": 0.5}, {"a": 1}, []),
        ({"a": None}, {"a": []}, []),
        (
            {"a": [{"b": 1}]},
            {"a": [{"b": 1}, {"c": 1}]},
            ["a[]: b only on one side", "a[]: c only on one side"],
        ),
        ({"n": {"x": 1}}, {"n": {"y": 2}}, []),
        ({"n": {"x": 1}}, {"n": {"y": "2"}}, ["n.*: 1 is no str as '2' is"]),
    ],
)
def test_differences_are_found(told: Any, shown: Any, found: list[str]) -> None:
    assert differences(told, shown, {"n"}) == found
