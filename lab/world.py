"""The 'office records' world: documents, the questions about them, the tasks of each variant.

A document is the shared prefix that a sender prefills::

    <s> employer-of Alice Acme . city-of Acme Paris . ... Passage: maps wine ink .

A question follows it; only the receiver runs it, and the answer ends with ``</s>``::

    Q: employer-of Alice           ->  Acme
    Q: employer-and-city-of Alice  ->  Acme Paris

Everything is drawn from a `random.Random`, so a seed fixes documents and questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lab import vocabulary as words

RECITED_WORDS: Final = 2
"""Number of words that the answer to a ``words-after`` question continues the passage by."""


@dataclass(frozen=True)
class Record:
    """What a document says about one person; organisation and city belong to nobody else."""

    person: str
    organisation: str
    city: str
    first_interest: str
    second_interest: str

    def facts(self) -> list[list[str]]:
        """The three sentences of this record, each a list of words."""
        return [
            ["employer-of", self.person, self.organisation, words.STOP],
            ["interests-of", self.person, self.first_interest, self.second_interest, words.STOP],
            ["city-of", self.organisation, self.city, words.STOP],
        ]


@dataclass(frozen=True)
class Document:
    """A shared prefix: its records, its passage and its words in order."""

    records: tuple[Record, ...]
    passage: tuple[str, ...]
    prefix: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about a document; `answer` leaves out the closing ``</s>``."""

    task: str
    question: tuple[str, ...]
    answer: tuple[str, ...]


def _cipher() -> dict[str, str]:
    """The coder's secret: a fixed permutation within organisations and within cities."""
    rng = random.Random(1234)
    mapping: dict[str, str] = {}
    for members in (words.ORGANISATIONS, words.CITIES):
        mapping.update(zip(members, rng.sample(members, len(members)), strict=True))
    return mapping


CIPHER: Final = _cipher()


def _coded(*plain: str) -> tuple[str, ...]:
    return tuple(CIPHER[word] for word in plain)


@dataclass(frozen=True)
class RecordTask:
    """A task that asks one question per record: subject, relation word and answer."""

    relation: str
    subject: Callable[[Record], str]
    answer: Callable[[Record], tuple[str, ...]]


def _person(record: Record) -> str:
    return record.person


def _organisation(record: Record) -> str:
    return record.organisation


RECORD_TASKS: Final[dict[str, RecordTask]] = {
    "employer": RecordTask("employer-of", _person, lambda r: (r.organisation,)),
    "interests": RecordTask("interests-of", _person, lambda r: (r.first_interest, r.second_interest)),
    "location": RecordTask("city-of", _organisation, lambda r: (r.city,)),
    "chain": RecordTask("employer-and-city-of", _person, lambda r: (r.organisation, r.city)),
    "reversed-interests": RecordTask(
        "interests-reversed-of", _person, lambda r: (r.second_interest, r.first_interest)
    ),
    "employee": RecordTask("employee-of", _organisation, lambda r: (r.person,)),
    "fan": RecordTask("fan-of", lambda r: r.first_interest, lambda r: (r.person, r.second_interest)),
    "headquarters": RecordTask("tenants-of", lambda r: r.city, lambda r: (r.organisation, r.person)),
    "coded-employer": RecordTask("employer-of", _person, lambda r: _coded(r.organisation)),
    "coded-location": RecordTask("city-of", _organisation, lambda r: _coded(r.city)),
}

RECITE: Final = "recite"

VARIANT_TASKS: Final[dict[str, tuple[str, ...]]] = {
    "base": ("employer", "interests", "location", "chain", RECITE),
    "coder": ("coded-employer", "coded-location", "reversed-interests"),
    "inverse": ("employee", "fan", "headquarters"),
    "mixed": ("employer", "interests", "location", "chain"),
    "analyst": ("employer", "reversed-interests", "location", "chain"),
}
"""The tasks each model is trained on: the base, a coder that answers in a cipher, an inverse
that answers from object to subject, an analyst with one new question, and mixed, an update of
the base: further training on its questions about records."""


def draw_document(rng: random.Random, persons: int, passage_words: int) -> Document:
    """A document about `persons` people, its facts shuffled, with a closing passage."""
    first_interests = rng.sample(words.INTERESTS, persons)
    columns = (
        rng.sample(words.PERSONS, persons),
        rng.sample(words.ORGANISATIONS, persons),
        rng.sample(words.CITIES, persons),
        first_interests,
        rng.choices(words.INTERESTS, k=persons),
    )
    records = tuple(Record(*fields) for fields in zip(*columns, strict=True))
    facts = [fact for record in records for fact in record.facts()]
    rng.shuffle(facts)
    free = sorted(set(words.INTERESTS) - set(first_interests))
    passage = rng.sample(free, passage_words)
    prefix = [words.BOS, *(word for fact in facts for word in fact), words.PASSAGE, *passage, words.STOP]
    return Document(records, tuple(passage), tuple(prefix))


def _questions_of(document: Document, task: str) -> list[Question]:
    """Every question of one task about a document."""
    if task == RECITE:
        return _recitations(document.passage)
    form = RECORD_TASKS[task]
    return [
        Question(task, (words.QUESTION, form.relation, form.subject(record)), form.answer(record))
        for record in document.records
    ]


def _recitations(passage: Sequence[str]) -> list[Question]:
    return [
        Question(
            RECITE,
            (words.QUESTION, "words-after", word),
            tuple(passage[index + 1 : index + 1 + RECITED_WORDS]),
        )
        for index, word in enumerate(passage[:-RECITED_WORDS])
    ]


def draw_questions(
    rng: random.Random, document: Document, tasks: Sequence[str], count: int
) -> list[Question]:
    """Up to `count` different questions, spread evenly over `tasks`, in random order."""
    pools = [_questions_of(document, task) for task in tasks]
    for pool in pools:
        rng.shuffle(pool)
    chosen: list[Question] = []
    while len(chosen) < count and any(pools):
        for pool in pools:
            if pool and len(chosen) < count:
                chosen.append(pool.pop())
    rng.shuffle(chosen)
    return chosen
