"""The head of a response tells what became of its request; `test_servers` has it from real servers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from droidspeak.integrations.vllm_connector.headers import OUTCOMES, OutcomeHeader, Outcomes, header_of

MISS = {
    "status": "fallback_reprefill",
    "reason": "miss",
    "exact_tokens": 0,
    "shared_tokens": 0,
    "plan": None,
    "source": None,
}
SHARED = MISS | {"status": "applied", "reason": "cross_model_hit", "plan": "1-2+kvmap:0", "source": "5f70"}
HEADER = "fallback_reprefill;reason=miss;exact_tokens=0;shared_tokens=0"


@pytest.mark.parametrize(
    ("name", "engine_name"),
    [
        ("cmpl-8d76", "cmpl-8d76-0-0123abcd"),
        ("cmpl-8d76", "1_cmpl-8d76-0-0123abcd"),
        ("chatcmpl-8d76", "chatcmpl-8d76-0123abcd"),
        ("chatcmpl-mine-7", "chatcmpl-mine-7-0123abcd"),
        ("chatcmpl-8d76", "chatcmpl-8d76_0-0123abcd"),
        ("resp_8d76", "resp_8d76_0-0123abcd"),
    ],
)
def test_a_request_is_found_by_the_name_in_its_response(name, engine_name):
    outcomes = Outcomes()
    outcomes.put(engine_name, MISS)
    assert (outcomes.take(name), outcomes.take(name)) == ([MISS], [])


def test_prompts_come_in_their_order():
    outcomes = Outcomes()
    outcomes.put("cmpl-a-10-0123abcd", SHARED)
    outcomes.put("cmpl-a-9-0123abcd", MISS)
    assert outcomes.take("cmpl-a") == [MISS, SHARED]


def test_the_oldest_are_forgotten():
    outcomes = Outcomes(2)
    for name in "abc":
        outcomes.put(f"chatcmpl-{name}-0123abcd", MISS)
    assert [outcomes.take(f"chatcmpl-{name}") for name in "abc"] == [[], [MISS], [MISS]]


def test_the_header_of_an_outcome():
    assert header_of(MISS) == HEADER
    assert header_of(SHARED) == (
        'applied;reason=cross_model_hit;exact_tokens=0;shared_tokens=0;plan="1-2+kvmap:0";source="5f70"'
    )


def answered(scope: dict[str, Any], *, known: int) -> list[dict[str, Any]]:
    """Messages of an answer; outcomes of so many prompts come when the head has been sent already."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        for number in range(known):
            OUTCOMES.put(f"cmpl-x-{number}-0123abcd", MISS)
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await send({"type": "http.response.body", "body": b"2"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(OutcomeHeader(app)(scope, None, send))
    return sent


def test_the_head_waits_for_the_first_of_the_body():
    noted = {"type": "http", "state": {"request_metadata": SimpleNamespace(request_id="cmpl-x")}}
    head, *body = answered(noted, known=1)
    assert head["headers"] == [(b"a", b"b"), (b"x-droidspeak", HEADER.encode())]
    assert [part["body"] for part in body] == [b"1", b"2"]
    assert answered(noted, known=0)[0]["headers"] == [(b"a", b"b")]
    assert answered({"type": "http"}, known=0)[0]["headers"] == [(b"a", b"b")]


@pytest.mark.parametrize(
    ("prompts", "header"), [(2, f"{HEADER}, {HEADER}"), (16, ", ".join([HEADER] * 16)), (17, None)]
)
def test_all_prompts_are_told_in_one_line_if_they_are_not_too_many(prompts, header):
    noted = {"type": "http", "state": {"request_metadata": SimpleNamespace(request_id="cmpl-x")}}
    head = answered(noted, known=prompts)[0]["headers"]
    assert head == [(b"a", b"b"), *([(b"x-droidspeak", header.encode())] if header else [])]
