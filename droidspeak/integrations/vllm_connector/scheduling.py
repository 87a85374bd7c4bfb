"""The scheduler's half: looks up, promises, orders loads and saves, and answers for each request.

    get_num_new_matched_tokens   lookup; asked at every step until the request is admitted
    update_state_after_alloc     the promise is kept: blocks are known, a load is ordered
    build_connector_meta         orders of this step, with the chunks that it completes
    update_connector_output      how loads ended; a request whose load failed gets no other promise
    request_finished             status and reason, for the response and the counters

Exact stays exact: before blocks that another model's KV goes into are allocated, the request's block
hashes are salted by the plan. vLLM then files them, and all that is computed after them, under names that
only this request has; a later request for the same prompt never meets them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from itertools import takewhile
from typing import Any

from droidspeak.connector import Connector, Match, Outcome, Reason
from droidspeak.integrations.vllm_connector.identity import Identities
from droidspeak.integrations.vllm_connector.messages import LoadOrder, Reports, SaveOrder, StepOrders
from droidspeak.integrations.vllm_connector.requests import PARAMETERS, RequestOptions, RequestState
from droidspeak.integrations.vllm_connector.tables import Tables
from droidspeak.layerselect import Requirement

__all__ = ["SchedulerHalf"]

_LOOKUP_SECONDS = 1.0  # a promise that was not kept by then is looked up again


class SchedulerHalf:
    """Serves vLLM's scheduler.

    Args:
        saves, loads: which of both this engine does.
        captured: layers whose E it captures.
        background: load between steps; requests wait, and the others go on.
        by_blocks: vLLM can compute blocks anew whose load has failed; else only a whole request, and only
            after a load between steps.
        mixes_adapters: requests without an adapter cannot be trusted in a batch with others (vLLM's CPU
            kernels read another request's adapter for them).
    """

    def __init__(
        self,
        connector: Connector,
        identities: Identities,
        *,
        requirement: Requirement,
        salt: str,
        saves: bool,
        loads: bool,
        captured: Collection[int],
        background: bool,
        by_blocks: bool,
        mixes_adapters: bool,
    ) -> None:
        self._connector, self._identities = connector, identities
        self._requirement, self._salt = requirement, salt
        self._saves, self._loads, self._by_blocks = saves, loads, by_blocks
        self._background = background or not by_blocks
        self._captured = frozenset(captured)
        self._mixes_adapters = mixes_adapters
        self._requests: dict[str, RequestState] = {}
        self._orders: list[LoadOrder] = []
        # Requests that ended in the step that loaded for them: vLLM tells of the load afterwards.
        self._unreported: dict[str, RequestState] = {}
        # Outcomes of requests that ended before the API server was told of them.
        self._ended: dict[str, dict[str, Any]] = {}
        self.cache_manager: Any = None

    def matched(self, request: Any, computed: int) -> tuple[int, bool]:
        """Tokens beyond `computed` that can be loaded, and whether between steps."""
        state = self._state(request)
        if not (self._loads and state.options.load) or state.failure or not _plain(request):
            return 0, False
        match = self._look_up(state)
        found = match.tokens - computed
        state.covered = found <= 0
        if state.covered:
            return 0, False
        if match.shared and not state.approximate:
            self._set_apart(request, state, match)
        return found, self._loads_between(request)

    def _loads_between(self, request: Any) -> bool:
        # vLLM has an adapter at hand only for requests of the running batch.
        return self._background and request.lora_request is None

    def _state(self, request: Any) -> RequestState:
        if request.request_id not in self._requests:
            options = RequestOptions.of(request.kv_transfer_params)
            if request.skip_reading_prefix_cache:
                # It wants logits of the whole prompt: vLLM loads nothing for it, whatever is promised.
                options = options.model_copy(update={"load": False})
            if request.lora_request is not None and not self._by_blocks:
                # It could load within a step only, and a load that fails could not be made good.
                options = options.model_copy(update={"load": False})
            self._requests[request.request_id] = RequestState(
                options,
                self._identities.manifest(request.lora_request),
                # Tenants of the engine are tenants of the store.
                "\0".join(filter(None, (self._salt, request.cache_salt))),
                tuple(request.prompt_token_ids or ()),
                adapter=request.lora_request.lora_int_id if request.lora_request else 0,
            )
        return self._requests[request.request_id]

    def _look_up(self, state: RequestState) -> Match:
        now = time.monotonic()
        if state.match is None or now - state.looked_up > _LOOKUP_SECONDS:
            waiting = sum(not other.admitted for other in self._requests.values()) - 1
            match = self._connector.lookup(
                state.tokens,
                state.source,
                salt=state.salt,
                requirement=state.options.requirement(self._requirement),
                share=state.options.share,
                queue_depth=max(0, waiting),
            )
            state.match, state.looked_up = match.up_to_missing_e(self._wanted_e(state)), now
        return state.match

    def _wanted_e(self, state: RequestState) -> Collection[int]:
        """Layers whose E is kept with chunks of this request."""
        if not self._saves or not state.options.save or state.source is None:
            return ()
        return self._connector.policies.transition_layers(state.source.source_id) & self._captured

    @staticmethod
    def _set_apart(request: Any, state: RequestState, match: Match) -> None:
        request.cache_salt = (
            f"droidspeak {request.cache_salt or ''} {match.source} {match.plan} {request.request_id}"
        )
        request.block_hashes.clear()
        request.update_block_hashes()
        state.approximate = True

    def allocated(self, request: Any, tables: Tables, promised: int) -> None:
        """The blocks of a request; `promised` tokens are to be loaded into them."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        state.admitted = True
        if promised == 0 or state.match is None:
            return
        match = state.match
        state.ordered = True
        self._orders.append(
            LoadOrder(
                request.request_id,
                match,
                match.tokens - promised,
                tables,
                state.tokens[: match.tokens],
                self._loads_between(request),
                request.lora_request.lora_int_id if request.lora_request else 0,
            )
        )

    def orders(self, step: Any) -> StepOrders:
        """What the workers do in `step`."""
        self.count_ended()
        loads, self._orders = self._orders, []
        if self._mixes_adapters:
            self._doubt_mixed(step)
        saves = list(self._saves_of(step)) if self._saves else []
        return StepOrders(loads, saves)

    def _doubt_mixed(self, step: Any) -> None:
        known = (self._requests.get(request_id) for request_id in step.num_scheduled_tokens)
        batch = [state for state in known if state is not None]
        if any(state.adapter for state in batch):
            for state in batch:
                state.doubtful |= not state.adapter

    def _saves_of(self, step: Any) -> Iterable[SaveOrder]:
        computed = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        cached = step.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, known in computed.items():
            if (state := self._requests.get(request_id)) is not None:
                yield from self._save(request_id, state, known, step.num_scheduled_tokens[request_id])

    def _save(self, request_id: str, state: RequestState, known: int, more: int) -> Iterable[SaveOrder]:
        """Orders what is whole with `more` tokens after those that were `known` before the step."""
        whole = min(known + more, len(state.tokens)) // self._connector.options.chunk_size
        if not self._may_save(state) or whole <= state.saved or state.source is None:
            return
        chunks, state.saved = range(max(state.saved, self._stored(state, known)), whole), whole
        if chunks:
            # vLLM's own word: of layers with a window it has let blocks go that the request once had.
            tables = tuple(map(tuple, self.cache_manager.get_block_ids(request_id)))
            yield SaveOrder(request_id, state.source, state.salt, state.tokens, chunks, tables)

    def _stored(self, state: RequestState, known: int) -> int:
        """Leading chunks that are loaded or were saved before: they need not be copied to find that out."""
        if state.match is not None:
            mine = str(self._connector.shard)  # what engines of another degree have saved is saved once more
            return sum(1 for _ in takewhile(lambda info: info.key.shard == mine, state.match.exact))
        if state.saved or state.source is None or known < self._connector.options.chunk_size:
            return 0
        return self._connector.saved(
            state.tokens[:known], state.source, salt=state.salt, e_layers=self._captured
        )

    @staticmethod
    def _may_save(state: RequestState) -> bool:
        return state.options.save and not (state.approximate or state.doubtful)

    def ended(self, reports: Reports | None, broken_blocks: set[int]) -> None:
        """How loads ended, and blocks whose content is wrong."""
        if broken_blocks and self.cache_manager is not None:
            # vLLM leaves them in its prefix cache until the request has computed them anew, which an aborted
            # one never does.
            self.cache_manager.evict_blocks(broken_blocks)
        for request_id, report in (reports.loads if reports else {}).items():
            state = self._requests.get(request_id) or self._unreported.get(request_id)
            if state is not None:
                state.report, state.failure = report, report.failure
                if report.failure is Reason.MAPS_UNUSABLE and state.match and state.match.source:
                    self._connector.forgo_maps(state.match.source)
                if report.failure:
                    state.match, state.saved = None, 0
        self.count_ended()

    def count_ended(self) -> None:
        """Counts the requests that ended before it was known what their loads brought."""
        ended, self._unreported = self._unreported, {}
        for request_id, state in ended.items():
            self._connector.record(state.outcome, state.match, request=request_id)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Of the requests whose outcome has become known since the last call, by vLLM's names of them."""
        news = {name: state for name, state in self._requests.items() if state.settled and not state.told}
        for state in news.values():
            state.told = True
        ended, self._ended = self._ended, {}
        return ended | {name: _told(state.outcome) for name, state in news.items()}

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Says what became of the request. It is counted when its load has been reported, too."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return None
        self._orders = [order for order in self._orders if order.request_id != request.request_id]
        if state.ordered and state.report is None:
            self._unreported[request.request_id] = state
        else:
            self._connector.record(state.outcome, state.match, request=request.request_id)
        if not state.told:
            self._ended[request.request_id] = _told(state.outcome)
        return {PARAMETERS: _told(state.outcome)}


def _plain(request: Any) -> bool:
    """Whether the prompt's token ids say all of it: not so with images or given embeddings."""
    return bool(request.prompt_token_ids) and not request.mm_features and request.prompt_embeds is None


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status.value,
        "reason": outcome.reason.value,
        "exact_tokens": outcome.exact_tokens,
        "shared_tokens": outcome.shared_tokens,
        "plan": None if outcome.plan is None else str(outcome.plan),
        "source": outcome.source,
    }
