"""What the scheduler's half counts and tells, on requests that no engine runs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.layerselect import Requirement

from ..connector.models import SIZE, fill, memory, model, prompt  # noqa: TID252

with warnings.catch_warnings():
    # Importing vLLM warns of what others have deprecated.
    warnings.simplefilter("ignore")
    from droidspeak.integrations.vllm_connector.requests import PARAMETERS
    from droidspeak.integrations.vllm_connector.scheduling import SchedulerHalf

ME, IDS = model(), prompt(3)


class Depths(Connector):
    """Notes how deep the queue was at each lookup."""

    seen: list[int]

    def lookup(self, *arguments: Any, **options: Any) -> Any:
        self.seen.append(options["queue_depth"])
        return super().lookup(*arguments, **options)


def half(*, stored: bool) -> SchedulerHalf:
    store = memory()
    if stored:
        fill(store, ME, IDS)
    connector = Depths(store, None, ConnectorOptions(chunk_size=SIZE))
    connector.seen = []
    return SchedulerHalf(
        connector,
        SimpleNamespace(manifest=lambda _: ME),  # type: ignore[arg-type]
        block_size=SIZE,
        requirement=Requirement(),
        salt="",
        saves=False,
        loads=True,
        captured=(),
        background=False,
        mixes_adapters=False,
    )


def request(name: str, **changes: Any) -> Any:
    known = {
        "request_id": name,
        "prompt_token_ids": list(IDS),
        "prompt_embeds": None,
        "mm_features": [],
        "kv_transfer_params": None,
        "lora_request": None,
        "cache_salt": None,
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**{**known, **changes})


def told(scheduler: SchedulerHalf, of: Any) -> tuple[str, str]:
    answer = scheduler.finished(of)
    assert answer is not None
    return answer[PARAMETERS]["status"], answer[PARAMETERS]["reason"]


def test_requests_that_run_do_not_wait_in_the_queue():
    scheduler = half(stored=False)
    running = [request(f"running {number}") for number in range(3)]
    for one in running:
        assert scheduler.matched(one, 0) == (0, False)
        scheduler.allocated(one, [1, 2, 3, 4], 0)
    waiting = request("waiting")
    scheduler.matched(waiting, 0)
    scheduler.matched(request("new"), 0)
    assert scheduler._connector.seen == [0, 0, 0, 0, 1]  # type: ignore[attr-defined]


def test_a_request_that_is_given_up_before_it_is_admitted_has_used_nothing():
    scheduler, one = half(stored=True), request("aborted")
    assert scheduler.matched(one, 0) == (3 * SIZE, False)
    assert told(scheduler, one) == ("fallback_reprefill", "miss")


@pytest.mark.parametrize(("computed", "found"), [(0, 3 * SIZE), (SIZE, 2 * SIZE), (3 * SIZE, 0)])
def test_a_hit_is_told_whether_the_store_or_the_engine_had_it(computed, found):
    scheduler, one = half(stored=True), request("served")
    assert scheduler.matched(one, computed) == (found, False)
    scheduler.allocated(one, [1, 2, 3, 4], found)
    assert told(scheduler, one) == ("applied", "exact_hit")


def test_a_request_that_reads_no_cache_is_promised_nothing():
    scheduler, one = half(stored=True), request("logprobs", skip_reading_prefix_cache=True)
    assert scheduler.matched(one, 0) == (0, False)
    assert told(scheduler, one) == ("fallback_reprefill", "opted_out")
