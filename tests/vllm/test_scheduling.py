"""What the scheduler's half counts and tells, on requests that no engine runs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from droidspeak.connector import Connector, ConnectorOptions, Reason
from droidspeak.layerselect import Requirement

from ..connector.models import SIZE, fill, memory, model, prompt  # noqa: TID252

with warnings.catch_warnings():
    # Importing vLLM warns of what others have deprecated.
    warnings.simplefilter("ignore")
    from droidspeak.integrations.vllm_connector.messages import LoadReport, Reports
    from droidspeak.integrations.vllm_connector.requests import PARAMETERS
    from droidspeak.integrations.vllm_connector.scheduling import SchedulerHalf

ME, IDS = model(), prompt(3)


class Depths(Connector):
    """Notes how deep the queue was at each lookup."""

    seen: list[int]

    def lookup(self, *arguments: Any, **options: Any) -> Any:
        self.seen.append(options["queue_depth"])
        return super().lookup(*arguments, **options)


def half(*, stored: int = 0, saves: bool = False, loads: bool = True) -> SchedulerHalf:
    store = memory()
    fill(store, ME, IDS, only=range(stored))
    connector = Depths(store, None, ConnectorOptions(chunk_size=SIZE))
    connector.seen = []
    return SchedulerHalf(
        connector,
        SimpleNamespace(manifest=lambda _: ME),  # type: ignore[arg-type]
        requirement=Requirement(),
        salt="",
        saves=saves,
        loads=loads,
        captured=(),
        background=False,
        by_blocks=True,
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
    scheduler = half()
    running = [request(f"running {number}") for number in range(3)]
    for one in running:
        assert scheduler.matched(one, 0) == (0, False)
        scheduler.allocated(one, ((1, 2, 3, 4),), 0)
    waiting = request("waiting")
    scheduler.matched(waiting, 0)
    scheduler.matched(request("new"), 0)
    assert scheduler._connector.seen == [0, 0, 0, 0, 1]  # type: ignore[attr-defined]


def test_a_request_that_is_given_up_before_it_is_admitted_has_used_nothing():
    scheduler, one = half(stored=3), request("aborted")
    assert scheduler.matched(one, 0) == (3 * SIZE, False)
    assert told(scheduler, one) == ("fallback_reprefill", "miss")


@pytest.mark.parametrize(("computed", "found"), [(0, 3 * SIZE), (SIZE, 2 * SIZE), (3 * SIZE, 0)])
def test_a_hit_is_told_whether_the_store_or_the_engine_had_it(computed, found, caplog):
    scheduler, one = half(stored=3), request("served")
    assert scheduler.matched(one, computed) == (found, False)
    scheduler.allocated(one, ((1, 2, 3, 4),), found)
    with caplog.at_level("DEBUG", logger="droidspeak"):
        assert told(scheduler, one) == ("applied", "exact_hit")
        scheduler.count_ended()
    assert "request id=served status=applied reason=exact_hit" in caplog.text


def test_a_request_that_reads_no_cache_is_promised_nothing():
    scheduler, one = half(stored=3), request("logprobs", skip_reading_prefix_cache=True)
    assert scheduler.matched(one, 0) == (0, False)
    assert told(scheduler, one) == ("fallback_reprefill", "opted_out")


def saved(scheduler: SchedulerHalf, of: Any, known: int, more: int) -> list[range]:
    """The chunks that a first step over `more` tokens after `known` ones keeps."""
    scheduler.cache_manager = SimpleNamespace(get_block_ids=lambda _: ([1, 2, 3, 4],))
    step = SimpleNamespace(
        num_scheduled_tokens={of.request_id: more},
        scheduled_new_reqs=[SimpleNamespace(req_id=of.request_id, num_computed_tokens=known)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
    )
    return [order.chunks for order in scheduler.orders(step).saves]


@pytest.mark.parametrize(("stored", "kept"), [(0, [range(3)]), (2, [range(2, 3)]), (3, [])])
def test_what_was_loaded_is_not_copied_to_be_saved(stored, kept):
    scheduler, one = half(stored=stored, saves=True), request("loads and saves")
    found, _ = scheduler.matched(one, 0)
    scheduler.allocated(one, ((1, 2, 3, 4),), found)
    assert saved(scheduler, one, found, len(IDS) - found) == kept


def test_what_was_loaded_in_vain_is_saved():
    scheduler, one = half(stored=2, saves=True), request("fails")
    found, _ = scheduler.matched(one, 0)
    scheduler.allocated(one, ((1, 2, 3, 4),), found)
    assert saved(scheduler, one, found, 1) == []
    scheduler.ended(Reports({one.request_id: LoadReport(0, 0.0, Reason.EVICTED)}), set())
    assert saved(scheduler, one, 0, len(IDS)) == [range(3)]


@pytest.mark.parametrize(("stored", "kept"), [(0, [range(3)]), (1, [range(1, 3)]), (3, [])])
def test_a_sender_saves_what_only_vllm_had(stored, kept):
    scheduler, one = half(stored=stored, saves=True, loads=False), request("sends")
    assert scheduler.matched(one, 2 * SIZE) == (0, False)
    scheduler.allocated(one, ((1, 2, 3, 4),), 0)
    # What the store has of what is computed now is found out without the engine.
    assert saved(scheduler, one, 3 * SIZE, len(IDS) - 3 * SIZE) == kept
