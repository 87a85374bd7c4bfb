"""The connector: what an engine talks to.

    match = connector.lookup(token_ids, receiver)      which chunks, which plan
    with connector.load(match) as stream: ...          layer by layer
    connector.record(outcome, match)                   always one answer, always counted
    session = connector.save(token_ids, source)        after the model's own prefill

Only exact caches are saved; what a plan mixed stays with its request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from droidspeak.connector.bandwidth import Bandwidths
from droidspeak.connector.layout import RowLayout
from droidspeak.connector.match import Match
from droidspeak.connector.memory import LoadMemory
from droidspeak.connector.options import ConnectorOptions
from droidspeak.connector.reporter import Reporter
from droidspeak.connector.saver import Publisher, SaveSession
from droidspeak.connector.shards import Shard
from droidspeak.connector.status import Outcome, Reason
from droidspeak.connector.stream import LayerStream
from droidspeak.connector.tally import Tally, log_request, match_attributes
from droidspeak.errors import Incompatible, StorageError
from droidspeak.layerselect import (
    Plan,
    Policy,
    PolicySet,
    Requirement,
    Situation,
    choose,
    predicted_ttft,
)
from droidspeak.layerselect.drift import DriftGuard
from droidspeak.logs import limited
from droidspeak.storage import (
    ChunkInfo,
    ChunkKey,
    Counters,
    PrefixHasher,
    SourceId,
    SourceManifest,
    Tier,
    require_compatible,
)
from droidspeak.storage.codecs import is_lossless
from droidspeak.storage.keys import TokenIds, salt_tag
from droidspeak.tracing import long_span, span

__all__ = ["Connector", "ConnectorOptions"]

_log = limited(logging.getLogger(__name__))


@dataclass(frozen=True)
class _Question:
    """What a request asks of other models' caches.

    Attributes:
        own: the match with the receiver's own chunks.
        hashes: of the chunks after them.
    """

    own: Match
    hashes: Sequence[str]
    receiver: SourceManifest
    requirement: Requirement
    queue_depth: int


class Connector:
    """Serves one engine process from one store.

    Args:
        store: any tier, usually a `TieredStore`. The connector does not close it.
        policies: which pairs may share, and how.
        guard: keeps back pairs that have drifted; without one, none is.
        engine: which door it serves, in reports (`droidspeak.connector.reports`).

    Attributes:
        counters: `requests` by status, `reasons` by reason, `exact_tokens`, `shared_tokens` by source,
            `bytes_loaded`, `chunks_saved`, `chunks_abandoned`, `chunks_dropped`, `save_failures`,
            `lookup_failures`.
        bandwidths: of each tier, as finished streams measured them.
        shard: this process's.
    """

    def __init__(
        self,
        store: Tier,
        policies: PolicySet | None = None,
        options: ConnectorOptions | None = None,
        *,
        guard: DriftGuard | None = None,
        engine: str = "library",
    ) -> None:
        self.store = store
        self.policies = PolicySet() if policies is None else policies
        self.options = options or ConnectorOptions()
        self.guard = guard
        self.counters = Counters()
        self.bandwidths = Bandwidths(counters=self.counters)
        self._tally = Tally(self.counters, self.policies)
        self.shard = Shard.parse(self.options.shard)
        self._unmapped: set[str] = set()
        self._memory = LoadMemory(self.options.load_memory)
        self._publisher = Publisher(store, self.options.codec, self.options.save_backlog, self.counters)
        self._reporter = Reporter(store, engine, self.options.report_interval, self.counters, guard)

    def lookup(
        self,
        token_ids: TokenIds,
        receiver: SourceManifest | None,
        *,
        salt: str = "",
        sender: SourceManifest | None = None,
        requirement: Requirement | None = None,
        share: bool = True,
        queue_depth: int = 0,
    ) -> Match:
        """The best match for a prompt; a match without chunks is false and says why.

        The receiver's own chunks come first; whether others may be used is only asked for what they leave.
        At least the last token is always left to the engine, which needs its logits.

        Args:
            receiver: `None` if the model could not be identified.
            sender: of other models' caches consider only this one's; all that have a policy if `None`.
            requirement: what the plan must reach.
            share: `False` allows the receiver's own exact cache only.
            queue_depth: requests that wait at the engine; while there are any, as little as may be is
                recomputed.

        Raises:
            UsageError: token ids that are no token ids.
        """
        asked = requirement or Requirement()
        with span("droidspeak.lookup", {"droidspeak.tokens": len(token_ids)}) as traced:
            started = time.perf_counter()
            match = self._lookup(token_ids, receiver, salt, sender, asked, share, queue_depth)
            self._tally.lookup(match, time.perf_counter() - started)
            traced.set(match_attributes(match))
        return match

    def _lookup(
        self,
        token_ids: TokenIds,
        receiver: SourceManifest | None,
        salt: str,
        sender: SourceManifest | None,
        requirement: Requirement,
        share: bool,
        queue_depth: int,
    ) -> Match:
        size = self.options.chunk_size
        hashes = PrefixHasher(size, salt).hashes(token_ids)[: max(0, len(token_ids) - 1) // size]
        nothing = Match(receiver, Reason.MISS, len(token_ids), size)
        if receiver is None:
            return replace(nothing, reason=Reason.UNKNOWN_WEIGHTS)
        if not hashes:
            return replace(nothing, reason=Reason.TOO_SHORT)
        own = self._own(nothing, receiver, hashes)
        rest = hashes[len(own.exact) :]
        if not rest:
            return own
        if not share:
            return replace(own, reason=Reason.OPTED_OUT) if own.reason is Reason.MISS else own
        question = _Question(own, rest, receiver, requirement, queue_depth)
        return self._of_others(question, sender)

    def load(
        self, match: Match, device: torch.device | str = "cpu", *, shard: Shard | None = None
    ) -> LayerStream:
        """Starts loading `match`; tensors land on `device`.

        Args:
            shard: the heads that are wanted, this process's by default.

        Raises:
            UsageError: a match without chunks.
        """
        self._reporter.wake()
        options = self.options
        return LayerStream(
            self.store,
            match,
            device=torch.device(device),
            loaders=options.loaders,
            deadline=options.load_deadline,
            shard=shard or self.shard,
            bandwidths=self.bandwidths,
            memory=self._memory,
            traced=long_span("droidspeak.load", match_attributes(match)),
        )

    def save(
        self,
        token_ids: TokenIds,
        source: SourceManifest | None,
        *,
        salt: str = "",
        e_layers: Collection[int] | None = None,
    ) -> SaveSession:
        """A session that keeps a prefill of `token_ids` by `source` itself.

        Chunks that are stored already with every E layer that policies need are left out. A model that
        could not be identified (`None`) saves nothing.

        Args:
            e_layers: layers whose E the engine can give; of all if `None`.

        Raises:
            UsageError: token ids that are no token ids.
        """
        self._reporter.wake()
        keys: list[ChunkKey | None] = []
        wanted: frozenset[int] = frozenset()
        if source is not None:
            hashes = PrefixHasher(self.options.chunk_size, salt).hashes(token_ids)
            wanted = self._wanted(source, e_layers)
            done = self._done(source, hashes, wanted)
            keys = [None if key in done else key for key in _keys(source.source_id, hashes, self.shard)]
        return SaveSession(
            keys,
            chunk_size=self.options.chunk_size,
            layout=None if source is None else RowLayout.of(source.architecture, self.shard.size),
            e_layers=wanted,
            publish=self._publisher.publish,
            counters=self.counters,
            salt=salt_tag(salt),
        )

    def saved(
        self,
        token_ids: TokenIds,
        source: SourceManifest,
        *,
        salt: str = "",
        e_layers: Collection[int] | None = None,
    ) -> int:
        """Leading chunks that `save` would leave out. Arguments are those of `save`."""
        hashes = PrefixHasher(self.options.chunk_size, salt).hashes(token_ids)
        done = self._done(source, hashes, self._wanted(source, e_layers))
        missing = (n for n, key in enumerate(_keys(source.source_id, hashes, self.shard)) if key not in done)
        return next(missing, len(hashes))

    def record(self, outcome: Outcome, match: Match | None = None, *, request: str | None = None) -> Outcome:
        """Counts and logs the answer to one request; returns it.

        Args:
            match: that was loaded, or was not; without one the request is not counted by pair.
            request: what the engine calls it, for the log.
        """
        receiver = match.receiver.source_id if match is not None and match.receiver else None
        self._tally.outcome(outcome, receiver)
        self._reporter.record(outcome, match)
        log_request(_log, outcome, receiver, request)
        return outcome

    def record_ttft(self, outcome: Outcome, seconds: float) -> None:
        """Counts the time to first token that the engine measured for the request of `outcome`."""
        self._tally.ttft(outcome, seconds)

    @property
    def saving(self) -> int:
        """Bytes that wait to be saved."""
        return self._publisher.nbytes

    def forgo_maps(self, sender: str) -> None:
        """Passes over plans that map what `sender` has, from now on: the engine has found that it cannot."""
        self._unmapped.add(sender)

    def flush(self) -> None:
        """Waits until everything saved so far has been handed to the store, or refused by it."""
        self._publisher.flush()

    def close(self) -> None:
        """Waits for what is being saved, and leaves a report. The store stays open: it is the caller's."""
        self._publisher.close()
        self._reporter.close()

    def _own(self, nothing: Match, receiver: SourceManifest, hashes: Sequence[str]) -> Match:
        infos, broken = self._leading(receiver.source_id, hashes, receiver.architecture.kv_heads)
        if infos:
            return replace(nothing, reason=Reason.EXACT_HIT, exact=tuple(infos))
        return replace(nothing, reason=Reason.STORE_UNAVAILABLE) if broken else nothing

    def _of_others(self, question: _Question, sender: SourceManifest | None) -> Match:
        """The best match with other models' chunks, of `sender` alone if one is given."""
        own, receiver = question.own, question.receiver
        policies = self._policies(receiver, sender)
        if (refusal := self._refuse(receiver, sender, policies)) is not None:
            return own if own else replace(own, reason=refusal)
        match = self._guarded(question, policies)
        if match.reason is Reason.MISS and sender is None and self._holds_refused(question):
            return replace(match, reason=Reason.POLICY_REFUSED)
        return match

    def _policies(self, receiver: SourceManifest, sender: SourceManifest | None) -> list[Policy]:
        """Policies whose plans fit `receiver`, of `sender` alone if one is given."""
        policies = self.policies.for_receiver(receiver.source_id)
        return [
            policy
            for policy in policies
            if policy.layers == receiver.architecture.layers
            and (sender is None or policy.sender == sender.source_id)
        ]

    def _refuse(
        self, receiver: SourceManifest, sender: SourceManifest | None, policies: Sequence[Policy]
    ) -> Reason | None:
        """Why the caches of the `sender` that was asked for may not be used."""
        if sender is None or sender.source_id == receiver.source_id:
            return None
        try:
            require_compatible(sender, receiver)
        except Incompatible as error:
            _log.warning("no sharing: %s", error)
            return Reason(error.reason)
        if policies:
            return None
        refused = sender.source_id in self.policies.refused_senders(receiver.source_id)
        return Reason.POLICY_REFUSED if refused else Reason.NO_POLICY

    def _holds_refused(self, question: _Question) -> bool:
        """Whether the store holds something of a sender whose policy was refused."""
        senders = self.policies.refused_senders(question.receiver.source_id)
        heads = question.receiver.architecture.kv_heads
        return any(self._leading(SourceId(sender), question.hashes[:1], heads)[0] for sender in senders)

    def _guarded(self, question: _Question, policies: Sequence[Policy]) -> Match:
        """The best match of pairs that have not drifted; without one, the best of the others is withheld."""
        drifted = [policy for policy in policies if self.guard and not self.guard.allowed(policy)]
        allowed = [policy for policy in policies if policy not in drifted]
        own = question.own
        best = self._best_shared(question, allowed)
        if best.shared or not drifted:
            return best
        withheld = self._best_shared(question, drifted)
        if not withheld.shared:
            return best
        return replace(own, reason=own.reason if own else Reason.DRIFT, withheld=withheld)

    def _best_shared(self, question: _Question, policies: Sequence[Policy]) -> Match:
        """The source with the most chunks behind the own ones; fewer recomputed layers win a tie."""
        own = question.own
        matches = [self._shared(question, policy) for policy in policies]
        best = max(matches, key=_preference, default=own)
        return best if best.shared or not own else own

    def _shared(self, question: _Question, policy: Policy) -> Match:
        own, floor = question.own, question.requirement.quality_floor
        followed = policy.without_maps() if policy.sender in self._unmapped else policy
        if followed is None or not followed.reaches(floor):
            reason = Reason.MAPS_UNUSABLE if policy.reaches(floor) else Reason.BELOW_FLOOR
            return replace(own, reason=reason)
        heads = question.receiver.architecture.kv_heads
        infos, broken = self._leading(SourceId(policy.sender), question.hashes, heads)
        if not infos:
            return replace(own, reason=Reason.STORE_UNAVAILABLE) if broken else own
        readable = _with_codec(infos, policy)
        situation = self._situation(question.receiver, readable, question.queue_depth)
        plan = choose(followed, question.requirement, situation)
        if plan is None or not plan.loaded:
            return replace(own, reason=Reason.PREFILL_CHOSEN)
        usable = _with_e(readable, plan)
        if not usable:
            return replace(own, reason=Reason.E_MISSING if readable else Reason.LOSSY_CODEC)
        return replace(
            own,
            reason=Reason.CROSS_MODEL_HIT,
            shared=tuple(usable),
            plan=plan,
            source=policy.sender,
            policy=policy,
            predicted_ttft=self._predicted(policy, plan, situation, len(usable)),
        )

    def _predicted(self, policy: Policy, plan: Plan, situation: Situation, chunks: int) -> float | None:
        if policy.costs is None:
            return None
        tokens = chunks * self.options.chunk_size
        if tokens != situation.tokens:
            situation = replace(situation, tokens=tokens)
        return predicted_ttft(policy.costs, plan, situation)

    def _situation(
        self, receiver: SourceManifest, infos: Sequence[ChunkInfo], queue_depth: int = 0
    ) -> Situation:
        layout = RowLayout.of(receiver.architecture, self.shard.size)
        return Situation(
            tokens=len(infos) * self.options.chunk_size,
            kv_bytes=layout.kv_bytes,
            e_bytes=layout.e_bytes,
            bandwidth=self.bandwidths.over([info.tier or self.store.name for info in infos]),
            queue_depth=queue_depth,
        )

    def _wanted(self, source: SourceManifest, e_layers: Collection[int] | None) -> frozenset[int]:
        """Layers whose E is kept with chunks of `source`, of those that the engine can give."""
        wanted = self.policies.transition_layers(source.source_id)
        return wanted if e_layers is None else wanted & set(e_layers)

    def _done(self, source: SourceManifest, hashes: Sequence[str], e_layers: frozenset[int]) -> set[ChunkKey]:
        """Chunks of `source` that are stored with all of `e_layers`."""
        held, _ = self._run(source.source_id, hashes, self.shard)
        return {info.key for info in held if e_layers <= set(info.e_layers)}

    def _leading(
        self, source: SourceId, hashes: Sequence[str], kv_heads: int
    ) -> tuple[list[ChunkInfo], bool]:
        """The longest run of chunks that can be read, and whether the store failed to say.

        Where one tensor-parallel degree has a gap, another one may go on: a receiver saves what it prefilled
        after the chunks of others. The first shard speaks for all of its degree.
        """
        found: list[ChunkInfo] = []
        ring = deque([self.shard, *(Shard(0, degree) for degree in self._degrees(kv_heads))])
        without, broken = 0, False
        while without < len(ring) and len(found) < len(hashes) and not broken:
            run, broken = self._run(source, hashes[len(found) :], ring[0])
            found += run
            without = 1 if run else without + 1
            ring.rotate(-1)
        return found, broken

    def _degrees(self, kv_heads: int) -> list[int]:
        """Other tensor-parallel degrees that a model of `kv_heads` can be split by."""
        others = (degree for degree in self.options.degrees if degree != self.shard.size)
        return [degree for degree in others if not (kv_heads % degree and degree % kv_heads)]

    def _run(self, source: SourceId, hashes: Sequence[str], shard: Shard) -> tuple[list[ChunkInfo], bool]:
        """What the store holds of these chunks, and whether it failed to say."""
        # Another degree is rarely there: what it costs to ask must not depend on how long the prompt is.
        steps = [hashes] if shard == self.shard else [hashes[:1], hashes[1:]]
        run: list[ChunkInfo] = []
        try:
            for step in filter(None, steps):
                found = self.store.leading(_keys(source, step, shard))
                run += found
                if not found:
                    break
        except StorageError as error:
            self.counters.add("lookup_failures")
            _log.debug("lookup failed: %s", error)
            return run, True
        return run, False


def _keys(source: SourceId, hashes: Sequence[str], shard: Shard) -> list[ChunkKey]:
    name = str(shard)
    return [ChunkKey(source, name, prefix) for prefix in hashes]


def _preference(match: Match) -> tuple[int, int, bool]:
    recomputed = match.plan.recomputed if match.plan else 0
    return len(match.shared), -recomputed, match.reason is not Reason.MISS


def _with_codec(infos: Sequence[ChunkInfo], policy: Policy) -> Sequence[ChunkInfo]:
    """The leading chunks that lost no bits, or lost them to the codec that `policy` was profiled with."""
    lossless = {codec for codec in {info.codec for info in infos} if is_lossless(codec)}
    fits = {*lossless, policy.codec}
    count = next((n for n, info in enumerate(infos) if info.codec not in fits), len(infos))
    return infos[:count]


def _with_e(infos: Sequence[ChunkInfo], plan: Plan) -> Sequence[ChunkInfo]:
    """The leading chunks that hold E of every transition layer of `plan`."""
    needed = set(plan.transition_layers)
    count = next((n for n, info in enumerate(infos) if not needed <= set(info.e_layers)), len(infos))
    return infos[:count]
