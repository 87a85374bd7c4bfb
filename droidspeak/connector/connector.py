"""The connector: what an engine talks to.

    match = connector.lookup(token_ids, receiver)      which chunks, which plan
    with connector.load(match) as stream: ...          layer by layer
    connector.record(outcome)                          always one answer, always counted
    session = connector.save(token_ids, source)        after the model's own prefill

Only exact caches are saved; what a plan mixed stays with its request.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from droidspeak.connector.match import Match
from droidspeak.connector.saver import SaveSession
from droidspeak.connector.status import Outcome, Reason
from droidspeak.connector.stream import LayerStream
from droidspeak.errors import ConfigError, Incompatible, StorageError
from droidspeak.layerselect import Plan, Policy, PolicySet, Requirement, choose
from droidspeak.storage import (
    DEFAULT_CHUNK_SIZE,
    ChunkInfo,
    ChunkKey,
    Counters,
    PrefixHasher,
    SourceId,
    SourceManifest,
    Tier,
    require_compatible,
)
from droidspeak.storage.codecs import get_codec
from droidspeak.storage.keys import TokenIds

__all__ = ["Connector", "ConnectorOptions"]

_log = logging.getLogger(__name__)
_WHOLE = "0of1"


@dataclass(frozen=True)
class ConnectorOptions:
    """How chunks are cut, coded and loaded.

    Attributes:
        chunk_size: tokens per chunk; sender and receiver must agree.
        codec: of what this process saves; everything can be read.
        load_deadline: seconds until a stream gives up.
        loaders: threads per stream.
        shard: this process's tensor-parallel shard.
    """

    chunk_size: int = DEFAULT_CHUNK_SIZE
    codec: str = "raw"
    load_deadline: float = 30.0
    loaders: int = 2
    shard: str = _WHOLE

    def __post_init__(self) -> None:
        PrefixHasher(self.chunk_size)
        if not get_codec(self.codec).lossless:
            raise ConfigError(f"codec {self.codec!r} is lossy: allowed only with a policy profiled with it")


class Connector:
    """Serves one engine process from one store.

    Args:
        store: any tier, usually a `TieredStore`. The connector does not close it.
        policies: which pairs may share, and how.

    Attributes:
        counters: `requests` by status, `reasons` by reason, `exact_tokens`, `shared_tokens`,
            `bytes_loaded`, `chunks_saved`, `chunks_abandoned`, `save_failures`, `lookup_failures`.
    """

    def __init__(
        self, store: Tier, policies: PolicySet | None = None, options: ConnectorOptions | None = None
    ) -> None:
        self.store = store
        self.policies = PolicySet() if policies is None else policies
        self.options = options or ConnectorOptions()
        self.counters = Counters()
        self._savers = ThreadPoolExecutor(1, "droidspeak-save")

    def lookup(
        self,
        token_ids: TokenIds,
        receiver: SourceManifest | None,
        *,
        salt: str = "",
        sender: SourceManifest | None = None,
        requirement: Requirement | None = None,
        share: bool = True,
    ) -> Match:
        """The best match for a prompt; a match without chunks is false and says why.

        At least the last token is always left to the engine, which needs its logits.

        Args:
            receiver: `None` if the model could not be identified.
            sender: consider only this model's caches; others if `None`, by policy.
            requirement: what the plan must reach.
            share: `False` allows the receiver's own exact cache only.

        Raises:
            UsageError: token ids that are no token ids.
        """
        size = self.options.chunk_size
        hashes = PrefixHasher(size, salt).hashes(token_ids)[: max(0, len(token_ids) - 1) // size]
        nothing = Match(receiver, Reason.MISS, len(token_ids), size)
        refusal = self._refuse(receiver, sender) or (None if hashes else Reason.TOO_SHORT)
        if receiver is None or refusal is not None:
            return replace(nothing, reason=refusal or Reason.UNKNOWN_WEIGHTS)
        own = self._own(nothing, receiver, hashes)
        rest = hashes[len(own.exact) :]
        if not rest or not share:
            return own if own else replace(own, reason=Reason.OPTED_OUT)
        return self._best_shared(own, receiver, rest, sender, requirement or Requirement())

    def load(self, match: Match, device: torch.device | str = "cpu") -> LayerStream:
        """Starts loading `match`; tensors land on `device`."""
        options = self.options
        return LayerStream(
            self.store,
            match,
            device=torch.device(device),
            loaders=options.loaders,
            deadline=options.load_deadline,
        )

    def save(self, token_ids: TokenIds, source: SourceManifest | None, *, salt: str = "") -> SaveSession:
        """A session that keeps a prefill of `token_ids` by `source` itself.

        Chunks that are stored already with every E layer that policies need are left out. A model that
        could not be identified (`None`) saves nothing.
        """
        keys: list[ChunkKey | None] = []
        e_layers: frozenset[int] = frozenset()
        if source is not None:
            e_layers = self.policies.transition_layers(source.source_id)
            hashes = PrefixHasher(self.options.chunk_size, salt).hashes(token_ids)
            wanted = self._keys(source.source_id, hashes)
            keys = [None if self._has(key, e_layers) else key for key in wanted]
        return SaveSession(
            self.store,
            keys,
            chunk_size=self.options.chunk_size,
            layers=0 if source is None else source.architecture.layers,
            e_layers=e_layers,
            codec=self.options.codec,
            executor=self._savers,
            counters=self.counters,
        )

    def record(self, outcome: Outcome) -> Outcome:
        """Counts and logs the answer to one request; returns it."""
        self.counters.add("requests", outcome.status.value)
        self.counters.add("reasons", outcome.reason.value)
        self.counters.add("exact_tokens", amount=outcome.exact_tokens)
        self.counters.add("shared_tokens", outcome.source or "", outcome.shared_tokens)
        self.counters.add("bytes_loaded", amount=outcome.bytes_loaded)
        _log.debug("%s (%s): %s", outcome.status, outcome.reason, outcome)
        return outcome

    def close(self) -> None:
        """Waits for what is being saved. The store stays open: it is the caller's."""
        self._savers.shutdown(wait=True)

    def _refuse(self, receiver: SourceManifest | None, sender: SourceManifest | None) -> Reason | None:
        if receiver is None:
            return Reason.UNKNOWN_WEIGHTS
        if sender is None or sender.source_id == receiver.source_id:
            return None
        try:
            require_compatible(sender, receiver)
        except Incompatible as error:
            _log.warning("no sharing: %s", error)
            return Reason(error.reason)
        known = self.policies.get(sender.source_id, receiver.source_id)
        return Reason.NO_POLICY if known is None else None

    def _own(self, nothing: Match, receiver: SourceManifest, hashes: list[str]) -> Match:
        infos, broken = self._leading(receiver.source_id, hashes)
        if infos:
            return replace(nothing, reason=Reason.EXACT_HIT, exact=tuple(infos))
        return replace(nothing, reason=Reason.STORE_UNAVAILABLE) if broken else nothing

    def _best_shared(
        self,
        own: Match,
        receiver: SourceManifest,
        hashes: list[str],
        sender: SourceManifest | None,
        requirement: Requirement,
    ) -> Match:
        """The source with the most chunks behind the own ones; fewer recomputed layers win a tie."""
        policies = [
            policy
            for policy in self.policies.for_receiver(receiver.source_id)
            if sender is None or policy.sender == sender.source_id
        ]
        matches = [self._shared(own, hashes, policy, requirement) for policy in policies]
        best = max(matches, key=_preference, default=own)
        return best if best.shared or not own else own

    def _shared(self, own: Match, hashes: list[str], policy: Policy, requirement: Requirement) -> Match:
        plan = choose(policy, requirement)
        if plan is None:
            return replace(own, reason=Reason.BELOW_FLOOR)
        infos, broken = self._leading(SourceId(policy.sender), hashes)
        usable = _with_e(infos, plan)
        if not usable:
            reason = Reason.E_MISSING if infos else Reason.STORE_UNAVAILABLE if broken else Reason.MISS
            return replace(own, reason=reason)
        return replace(
            own, reason=Reason.CROSS_MODEL_HIT, shared=tuple(usable), plan=plan, source=policy.sender
        )

    def _leading(self, source: SourceId, hashes: list[str]) -> tuple[list[ChunkInfo], bool]:
        try:
            return self.store.leading(self._keys(source, hashes)), False
        except StorageError as error:
            self.counters.add("lookup_failures")
            _log.debug("lookup failed: %s", error)
            return [], True

    def _has(self, key: ChunkKey, e_layers: frozenset[int]) -> bool:
        try:
            info = self.store.head(key)
        except StorageError:
            return False
        return info is not None and e_layers <= set(info.e_layers)

    def _keys(self, source: SourceId, hashes: list[str]) -> list[ChunkKey]:
        return [ChunkKey(source, self.options.shard, prefix) for prefix in hashes]


def _preference(match: Match) -> tuple[int, int, bool]:
    recomputed = match.plan.recomputed if match.plan else 0
    return len(match.shared), -recomputed, match.reason is not Reason.MISS


def _with_e(infos: list[ChunkInfo], plan: Plan) -> list[ChunkInfo]:
    """The leading chunks that hold E of every transition layer of `plan`."""
    needed = set(plan.transition_layers)
    count = next((n for n, info in enumerate(infos) if not needed <= set(info.e_layers)), len(infos))
    return infos[:count]
