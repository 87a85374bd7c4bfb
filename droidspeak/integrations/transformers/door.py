"""DroidSpeak for transformers: prefill from the store, save what was computed, generate.

    droid = DroidSpeak(model, store, policies)
    answer = droid.generate(input_ids, max_new_tokens=16)        # does all
    prefix = droid.prefill(token_ids)                            # for your own loop:
    model(token_ids[None, prefix.tokens:], past_key_values=prefix.past_key_values)

The receiver's own caches are exact and are saved; caches of other models are used as a policy says and
are never saved. Whatever is wrong with the cache, the model prefills and the outcome says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from droidspeak.connector import Connector, ConnectorOptions, LayerStream, Match, Outcome, Reason
from droidspeak.errors import LoadFailed, MapsUnusable, UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.firsttoken import FirstToken
from droidspeak.integrations.transformers.identity import ModelIdentity
from droidspeak.integrations.transformers.kv import KV, empty_cache, past_key_values, plan_batch, stack
from droidspeak.integrations.transformers.partial import partial_prefill
from droidspeak.integrations.transformers.shadow import Shadow
from droidspeak.layerselect import Plan, PolicySet, Requirement
from droidspeak.layerselect.drift import DriftGuard, DriftOptions
from droidspeak.layerselect.mapping import MapCache
from droidspeak.logs import limited
from droidspeak.storage import SourceManifest, Tier
from droidspeak.tracing import Attributes, span

if TYPE_CHECKING:
    from droidspeak.telemetry.export import MetricsServer

__all__ = ["DroidSpeak", "Generation", "Prefix"]

_log = limited(logging.getLogger(__name__))

# Modes of `generate` that would read the prompt anew over its prefix, and say something else.
_WITHOUT_PREFIX = (
    "assistant_early_exit",
    "assistant_model",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
)


@dataclass(frozen=True)
class Prefix:
    """The leading `tokens` of a prompt, ready for the model.

    Attributes:
        layers: per layer K and V, `[tokens, kv_heads, head_dim]`; empty if `tokens` is 0.
        outcome: where they came from.
    """

    config: Any
    layers: tuple[KV, ...]
    outcome: Outcome

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    @property
    def past_key_values(self) -> DynamicCache:
        """A new cache over `layers` at each call; using one does not change another."""
        return past_key_values(self.config, self.layers) if self.layers else empty_cache(self.config)


@dataclass(frozen=True)
class Generation:
    """What `generate` returned, and the outcome of each row."""

    sequences: Any
    outcomes: tuple[Outcome, ...]


class DroidSpeak:
    """One model on one store.

    Args:
        model: any decoder-only model of the `model.model.layers` shape, PEFT-wrapped or not, in eval mode.
        store: a tier, usually a `TieredStore`; stays the caller's to close.
        policies: which other models' caches may be used, and how.
        folder: the unchanged folder that weights and tokenizer were loaded from; it makes this model the
            same source in every process. Without it the weights are hashed in memory. Give it after
            the model has found its device and dtype.
        options: chunk size, codec, deadlines.
        save: keep what this model prefills.
        requirement: what plans must reach, unless a call says otherwise.
        drift: how often requests are checked for drift (`shadow`); none is if `None`.

    Raises:
        UsageError: a model of another shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: Tier,
        policies: PolicySet | None = None,
        *,
        folder: Path | str | None = None,
        options: ConnectorOptions | None = None,
        save: bool = True,
        requirement: Requirement | None = None,
        drift: DriftOptions | None = None,
    ) -> None:
        self.model = model
        self.decoder = Decoder(model)
        guard = DriftGuard(drift) if drift else None
        self.connector = Connector(store, policies, options, guard=guard, engine="transformers")
        self._identity = ModelIdentity(model, folder)
        self._maps = MapCache(self.decoder.device)
        self._save, self._requirement = save, requirement
        self._shadow = self._new_shadow(guard) if guard else None
        # Now, while the folder still is what the model was loaded from.
        self._identity.manifest()

    @property
    def manifest(self) -> SourceManifest | None:
        """Who this model is now; `None` if it cannot be identified, and then nothing is shared."""
        return self._identity.manifest()

    def prefill(
        self,
        token_ids: Tensor | Sequence[int],
        *,
        salt: str = "",
        sender: SourceManifest | None = None,
        requirement: Requirement | None = None,
        share: bool = True,
    ) -> Prefix:
        """The longest prefix of whole chunks, from the store or computed; at least one token is left.

        Args:
            token_ids: the whole prompt, `[tokens]`.
            salt: the tenant's; caches under another salt do not exist for this call.
            sender: use only this model's caches besides the own ones.
            requirement: what a plan must reach.
            share: `False` keeps to the own exact cache.

        Raises:
            UsageError: token ids that are none, or an empty prompt.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UsageError(f"a prompt is a flat list of at least one token id, not {list(ids.shape)}")
        with span("droidspeak.prefill", {"droidspeak.tokens": len(ids)}) as traced:
            prefix = self._prefix(ids, salt, sender, requirement or self._requirement, share)
            outcome = prefix.outcome
            traced.set({"droidspeak.status": outcome.status.value, "droidspeak.reason": outcome.reason.value})
        return prefix

    def _prefix(
        self,
        ids: Tensor,
        salt: str,
        sender: SourceManifest | None,
        requirement: Requirement | None,
        share: bool,
    ) -> Prefix:
        receiver = self.manifest
        match = self.connector.lookup(
            ids,
            receiver,
            salt=salt,
            sender=sender,
            requirement=requirement,
            share=share,
        )
        if receiver is not None and self._save:
            wanted = self.connector.policies.transition_layers(receiver.source_id)
            match = match.up_to_missing_e(wanted)
        prefix = self._load(ids, match) if match else Prefix(self.decoder.config, (), _outcome(match))
        if not prefix.outcome.shared_tokens:
            prefix = self._prefill_rest(ids, prefix, receiver, salt)
        self.connector.record(prefix.outcome, match)
        if self._shadow is not None:
            self._shadow.offer(ids, match, prefix.outcome, prefix.layers)
        return prefix

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        salt: str = "",
        sender: SourceManifest | None = None,
        requirement: Requirement | None = None,
        share: bool = True,
        **options: Any,
    ) -> Generation:
        """`model.generate` over prefixes from the store.

        Args:
            input_ids: whole prompts, `[batch, width]`, left-padded.
            attention_mask: `[batch, width]`, 0 on padding; needed if there is any.
            options: for `model.generate`.

        Raises:
            UsageError: prompts that are not left-padded, or a mode of `generate` that takes no prefix.
        """
        started = time.perf_counter()
        copies = _copies(self.model, options)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.ndim != 2 or mask.shape != input_ids.shape:
            raise UsageError(
                f"prompts and mask must be [batch, width], not {list(input_ids.shape)}, {list(mask.shape)}"
            )
        lengths = [int(count) for count in mask.sum(1)]
        if not all(bool(row[len(row) - n :].all()) for row, n in zip(mask, lengths, strict=True)):
            raise UsageError("prompts must be padded on the left: tokenizer.padding_side = 'left'")
        prefixes = [
            self.prefill(row[len(row) - n :], salt=salt, sender=sender, requirement=requirement, share=share)
            for row, n in zip(input_ids, lengths, strict=True)
        ]
        cache = self._joined(prefixes, lengths, width=input_ids.shape[1])
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        first = FirstToken()
        options["stopping_criteria"] = first.beside(options.get("stopping_criteria"))
        with torch.no_grad():
            sequences = self.model.generate(
                input_ids=input_ids, attention_mask=mask, past_key_values=cache, **options
            )
        outcomes = tuple(prefix.outcome for prefix in prefixes)
        for outcome in outcomes if first.at else ():
            self.record_ttft(outcome, first.at - started)
        return Generation(sequences, outcomes)

    def record_ttft(self, outcome: Outcome, seconds: float) -> None:
        """Counts the time to first token of a request, for those with a generate loop of their own."""
        self.connector.record_ttft(outcome, seconds)

    def expose_metrics(self, port: int | None = None) -> MetricsServer | None:
        """Puts this model's metrics (docs/metrics.md) on prometheus_client's registry.

        Args:
            port: serve that registry on 127.0.0.1:`port` too, until what is returned is closed; 0 takes a
                free one. `droidspeak.telemetry.export` can do more.

        Raises:
            MissingExtra: prometheus_client is not installed.
            ConfigError: the port is taken.
        """
        from droidspeak.telemetry.export import expose, serve_metrics

        expose(self.connector)
        return None if port is None else serve_metrics(port=port)

    def flush(self) -> None:
        """Waits until everything saved so far has been handed to the store, or refused by it.

        And until the requests sampled so far are checked for drift.
        """
        self.connector.flush()
        if self._shadow is not None:
            self._shadow.flush()

    def close(self) -> None:
        """Waits for what is being saved, and for the sample that is being checked for drift."""
        if self._shadow is not None:
            self._shadow.close()
        self.connector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_shadow(self, guard: DriftGuard) -> Shadow:
        return Shadow(
            self.decoder,
            guard,
            self.connector.counters,
            load=lambda ids, match: self._load(ids, match).layers,
            manifest=self._identity.manifest,
        )

    def _load(self, ids: Tensor, match: Match) -> Prefix:
        """The prefix that `match` promises; an empty one if loading fails."""
        plan = match.plan or Plan.recompute(self.decoder.num_layers, ())
        layers: list[KV] = []
        stream: LayerStream | None = None
        try:
            # First: without them nothing that is loaded is of use.
            maps = self._maps.get(match.policy) if match.policy and plan.needs_maps else None
            with (
                self.connector.load(match, self.decoder.device) as stream,
                span("droidspeak.recompute", _work_of(plan, match)),
            ):
                layers = partial_prefill(
                    plan,
                    self.decoder,
                    ids[: match.tokens],
                    stream,
                    exact_tokens=match.exact_tokens,
                    maps=maps,
                )
        except LoadFailed as error:
            match = match.without_chunks(Reason(error.reason))
        except MapsUnusable as error:
            _log.warning("prefilled: %s", error)
            match = match.without_chunks(Reason.MAPS_UNUSABLE)
        return Prefix(self.decoder.config, tuple(layers), _outcome(match, stream))

    def _prefill_rest(
        self, ids: Tensor, prefix: Prefix, receiver: SourceManifest | None, salt: str
    ) -> Prefix:
        """Computes the whole chunks after an exact prefix, and saves them: all of it is the model's own.

        A prompt that ends with a chunk is saved whole; its last token is then left out of the prefix.
        """
        size = self.connector.options.chunk_size
        end = len(ids) // size * size
        if end <= prefix.tokens:
            return prefix
        session = self.connector.save(ids[:end], receiver if self._save else None, salt=salt)
        start = prefix.tokens
        fresh: list[KV] = []

        def keep(layer: int, k: Tensor, v: Tensor, e: Tensor | None) -> None:
            session.put(layer, k, v, e, start=start)
            fresh.append((k, v))

        self.decoder.prefill(ids[start:end], past=prefix.layers, e_layers=session.e_layers, on_layer=keep)
        session.finish()
        if start:
            fresh = [_append(own, new) for own, new in zip(prefix.layers, fresh, strict=True)]
        left = min(end, len(ids) - 1)
        return replace(prefix, layers=tuple((k[:left], v[:left]) for k, v in fresh))

    def _joined(self, prefixes: Sequence[Prefix], lengths: Sequence[int], width: int) -> DynamicCache:
        """The prefixes as one cache for prompts that are padded to `width` columns."""
        if list(lengths) == [width]:
            return prefixes[0].past_key_values
        plan = plan_batch(lengths, [prefix.tokens for prefix in prefixes])
        if plan.columns:
            # Padding that all rows share has columns too.
            plan = plan._replace(columns=plan.columns + width - max(lengths))
        return stack(self.decoder.config, [prefix.layers for prefix in prefixes], plan)


def _copies(model: Any, options: Mapping[str, Any]) -> int:
    """Rows that `generate` makes of each prompt. Raises `UsageError` for a mode that takes no prefix."""
    config = options.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    refused = [name for name in _WITHOUT_PREFIX if setting(name)]
    if setting("use_cache") is False:
        refused.append("use_cache=False")
    if refused:
        raise UsageError(f"{', '.join(refused)}: generation over a prefix is not possible with it")
    return max(setting("num_beams") or 1, setting("num_return_sequences") or 1)


def _work_of(plan: Plan, match: Match) -> Attributes:
    return {
        "droidspeak.recomputed_layers": plan.recomputed if match.shared else 0,
        "droidspeak.mapped_layers": len(plan.mapped),
        "droidspeak.shared_tokens": match.shared_tokens,
    }


def _append(own: KV, new: KV) -> KV:
    return torch.cat([own[0], new[0]]), torch.cat([own[1], new[1]])


def _outcome(match: Match, stream: LayerStream | None = None) -> Outcome:
    return Outcome(
        reason=match.reason,
        tokens=match.length,
        exact_tokens=match.exact_tokens,
        shared_tokens=match.shared_tokens,
        plan=match.plan,
        source=match.source,
        bytes_loaded=stream.bytes_loaded if stream else 0,
        wait_seconds=stream.wait_seconds if stream else 0.0,
    )
