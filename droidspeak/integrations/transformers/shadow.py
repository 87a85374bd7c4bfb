"""Shadow prefill: checks sampled requests for the drift guard, off the critical path.

    offer     after a request's prefill; one that the guard samples waits in a short queue
    worker    the receiver's own cache of the prefix   ->  greedy answer of a few tokens
              the mixed cache of the same prefix       ->  the same tokens, teacher-forced
              their agreement and divergence           ->  guard

While a pair serves, the mixed cache is the one that served, and the shadow prefills the receiver's own.
While it is drifted it is the other way round: the request has the receiver's own, and the match that was
withheld is loaded. Nothing is saved: exact caches left by the shadow would make later requests exact hits,
and what is sampled would change what there is to sample.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from droidspeak.connector import Match, Outcome
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV
from droidspeak.integrations.transformers.loading import eos_ids
from droidspeak.integrations.transformers.partial import capture
from droidspeak.integrations.transformers.rows import Row, agreement, divergence, greedy, teacher_forced
from droidspeak.layerselect import Policy
from droidspeak.layerselect.drift import DriftGuard
from droidspeak.storage import Counters, SourceManifest

__all__ = ["Shadow"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sample:
    """One request. `layers` are of its prefix: the mixed ones, or the receiver's own if `withheld`."""

    policy: Policy
    match: Match
    withheld: bool
    token_ids: Tensor
    layers: Sequence[KV]

    @property
    def tokens(self) -> int:
        return self.match.tokens


class Shadow:
    """Checks the requests of one door.

    Args:
        decoder: the receiver; the worker runs it while requests do.
        guard: says what to sample, and hears what was found.
        counters: gets, by sender, `drift_fallbacks` (requests whose pair was drifted), `drift_samples`
            (checked), `drift_dropped` (sampled, and no room), `drift_turns` (`drifted`, `recovered`), and
            `drift_failures` (`model_changed`, `not_loaded`, `error`).
        load: K and V of every layer as a match says, none if that fails.
        manifest: who the model is now. One that changed since the request (an adapter switched, say) is not
            what the request was served by, and the sample is let go.
        max_new_tokens: tokens of the answers that are compared.
        waiting: samples that may wait; each keeps its request's cache in memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        guard: DriftGuard,
        counters: Counters,
        *,
        load: Callable[[Tensor, Match], Sequence[KV]],
        manifest: Callable[[], SourceManifest | None],
        max_new_tokens: int = 8,
        waiting: int = 2,
    ) -> None:
        self._decoder, self._guard, self._counters = decoder, guard, counters
        self._load, self._manifest = load, manifest
        self._max_new_tokens = max_new_tokens
        self._queue: queue.Queue[_Sample | None] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def offer(self, token_ids: Tensor, match: Match, outcome: Outcome, layers: Sequence[KV]) -> None:
        """A request that was just prefilled; returns at once.

        Args:
            token_ids: the whole prompt, `[tokens]`.
            match: what the lookup found.
            outcome: what became of it.
            layers: K and V of its prefix; only read.
        """
        withheld = match.withheld is not None
        match = match.withheld or match
        policy = match.policy
        if policy is None or not (withheld or outcome.shared_tokens):
            return
        if withheld:
            self._counters.add("drift_fallbacks", policy.sender)
        if self._guard.sample(policy):
            self._enqueue(_Sample(policy, match, withheld, token_ids.clone(), layers))

    def flush(self) -> None:
        """Waits until all samples taken so far are checked."""
        self._queue.join()

    def close(self) -> None:
        """Waits for the sample that is being checked, lets those that wait go, and takes no more."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is None:
            return
        while self._let_go():
            pass
        self._queue.put(None)
        thread.join()

    def _enqueue(self, sample: _Sample) -> None:
        with self._lock:
            if self._closed or self._queue.full():
                self._counters.add("drift_dropped", sample.policy.sender)
                return
            self._queue.put_nowait(sample)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="droidspeak-shadow", daemon=True)
                self._thread.start()

    def _let_go(self) -> bool:
        """Drops one waiting sample, if there is one."""
        try:
            sample = self._queue.get_nowait()
        except queue.Empty:
            return False
        if sample is not None:
            self._counters.add("drift_dropped", sample.policy.sender)
        self._queue.task_done()
        return True

    def _work(self) -> None:
        while True:
            sample = self._queue.get()
            try:
                if sample is None:
                    return
                self._check(sample)
            except BaseException:  # noqa: BLE001 - a shadow harms nobody, whatever the model or a tier raises
                _log.exception("a request could not be checked for drift")
                self._counters.add("drift_failures", "error")
            finally:
                self._queue.task_done()

    def _check(self, sample: _Sample) -> None:
        if not self._unchanged(sample):
            return
        mixed = self._mixed(sample)
        if not mixed:
            self._counters.add("drift_failures", "not_loaded")
            return
        suffix = tuple(sample.token_ids[sample.tokens :].tolist())
        rows = Row(self._own(sample), suffix), Row(mixed, suffix)
        ends = eos_ids(self._decoder.model)
        answers = greedy(self._decoder, rows[:1], max_new_tokens=self._max_new_tokens, eos_ids=ends)
        # One after the other: together, both long prefixes would be copied.
        reference, logits = (teacher_forced(self._decoder, [row], answers)[0] for row in rows)
        if not self._unchanged(sample):
            return
        self._counters.add("drift_samples", sample.policy.sender)
        if self._guard.observe(sample.policy, agreement(reference, logits), divergence(reference, logits)):
            turn = "recovered" if self._guard.allowed(sample.policy) else "drifted"
            self._counters.add("drift_turns", turn)

    def _unchanged(self, sample: _Sample) -> bool:
        unchanged = self._manifest() == sample.match.receiver
        if not unchanged:
            self._counters.add("drift_failures", "model_changed")
        return unchanged

    def _own(self, sample: _Sample) -> Sequence[KV]:
        if not sample.withheld:
            return capture(self._decoder, sample.token_ids[: sample.tokens]).layers
        return [(k[: sample.tokens], v[: sample.tokens]) for k, v in sample.layers]

    def _mixed(self, sample: _Sample) -> Sequence[KV]:
        """The mixed cache; nothing if it cannot be loaded."""
        return self._load(sample.token_ids, sample.match) if sample.withheld else sample.layers
