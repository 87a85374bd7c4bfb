from __future__ import annotations

import json

import pytest

from droidspeak.errors import PromptError
from droidspeak.prompts import load_prompts

TEXT = {"id": "1", "prefix": "p", "question": "q", "answer": "a"}
IDS = {"id": "2", "prefix": [1, 2], "question": [3], "answer": [4]}


def write(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_texts_and_ids(tmp_path):
    (text,) = load_prompts(write(tmp_path, TEXT, ""))
    assert (text.prefix, text.is_text) == ("p", True)
    (ids,) = load_prompts(write(tmp_path, IDS))
    assert (ids.prefix, ids.answer, ids.is_text) == ((1, 2), (4,), False)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no prompts"),
        (["{"], ":1: not JSON"),
        ([TEXT, "[]"], ":2: lacks id, prefix, question, answer"),
        ([{**TEXT, "prefix": ""}], ":1: prefix must be"),
        ([{**IDS, "question": [1, -3]}], ":1: question must be"),
        ([{**IDS, "question": [True]}], ":1: question must be"),
        ([{**IDS, "answer": "x"}], ":1: mixes"),
        ([TEXT, IDS], "mixes texts and token ids"),
        ([TEXT, TEXT], "'1' stands twice"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, rows, says):
    with pytest.raises(PromptError) as caught:
        load_prompts(write(tmp_path, *rows))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(tmp_path / "none.jsonl")
