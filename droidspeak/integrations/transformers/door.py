"""DroidSpeak for transformers: prefill from the store, save what was computed, generate.

    droid = DroidSpeak(model, store, policies)
    answer = droid.generate(input_ids, max_new_tokens=16)        # does all
    prefix = droid.prefill(token_ids)                            # for your own loop:
    model(token_ids[None, prefix.tokens:], past_key_values=prefix.past_key_values)

The receiver's own caches are exact and are saved; caches of other models are used as a policy says and
are never saved. Whatever is wrong with the cache, the model prefills and the outcome says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from droidspeak.connector import Connector, ConnectorOptions, LayerStream, Match, Outcome, Reason
from droidspeak.errors import LoadFailed, UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.identity import ModelIdentity
from droidspeak.integrations.transformers.kv import KV, past_key_values, plan_batch, stack
from droidspeak.integrations.transformers.partial import partial_prefill
from droidspeak.layerselect import Plan, PolicySet, Requirement
from droidspeak.storage import SourceManifest, Tier

__all__ = ["DroidSpeak", "Generation", "Prefix"]


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
        return past_key_values(self.config, self.layers) if self.layers else DynamicCache(config=self.config)


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
            same source in every process. Without it the weights are hashed in memory.
        options: chunk size, codec, deadlines.
        save: keep what this model prefills.
        requirement: what plans must reach, unless a call says otherwise.

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
    ) -> None:
        self.model = model
        self.decoder = Decoder(model)
        self.connector = Connector(store, policies, options)
        self._identity = ModelIdentity(model, folder)
        self._save, self._requirement = save, requirement

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
        receiver = self.manifest
        match = self.connector.lookup(
            ids,
            receiver,
            salt=salt,
            sender=sender,
            requirement=requirement or self._requirement,
            share=share,
        )
        prefix = self._from_store(ids, match) if match else None
        if prefix is None or isinstance(prefix, Reason):
            match = replace(match, reason=prefix or match.reason, exact=(), shared=(), plan=None, source=None)
            prefix = Prefix(self.decoder.config, (), _outcome(match))
        if not match.shared:
            prefix = self._prefill_rest(ids, prefix, receiver, salt)
        self.connector.record(prefix.outcome)
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
            UsageError: prompts that are not left-padded.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = [int(count) for count in mask.sum(1)]
        rows = [ids[len(ids) - length :] for ids, length in zip(input_ids, lengths, strict=True)]
        if not all(bool(row[len(row) - n :].all()) for row, n in zip(mask, lengths, strict=True)):
            raise UsageError("prompts must be padded on the left: tokenizer.padding_side = 'left'")
        choice = {"salt": salt, "sender": sender, "requirement": requirement, "share": share}
        prefixes = [self.prefill(row, **choice) for row in rows]  # type: ignore[arg-type]
        with torch.no_grad():
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=self._joined(prefixes, lengths),
                **options,
            )
        return Generation(sequences, tuple(prefix.outcome for prefix in prefixes))

    def close(self) -> None:
        """Waits for what is being saved."""
        self.connector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _from_store(self, ids: Tensor, match: Match) -> Prefix | Reason:
        with self.connector.load(match, self.decoder.device) as stream:
            plan = match.plan or Plan.parse("reuse", self.decoder.num_layers)
            try:
                layers = partial_prefill(
                    plan, self.decoder, ids[: match.tokens], stream, exact_tokens=match.exact_tokens
                )
            except LoadFailed as error:
                return Reason(error.reason)
            return Prefix(self.decoder.config, tuple(layers), _outcome(match, stream))

    def _prefill_rest(
        self, ids: Tensor, prefix: Prefix, receiver: SourceManifest | None, salt: str
    ) -> Prefix:
        """Computes the whole chunks after an exact prefix, and saves them: all of it is the model's own."""
        size = self.connector.options.chunk_size
        end = (len(ids) - 1) // size * size
        if end <= prefix.tokens:
            return prefix
        session = self.connector.save(ids[:end], receiver if self._save else None, salt=salt)
        start, fresh = prefix.tokens, []

        def keep(layer: int, k: Tensor, v: Tensor, e: Tensor | None) -> None:
            session.put(layer, k, v, e, start=start)
            fresh.append((k, v))

        self.decoder.prefill(ids[start:end], past=prefix.layers, e_layers=session.e_layers, on_layer=keep)
        session.finish()
        layers = (
            [_append(own, new) for own, new in zip(prefix.layers, fresh, strict=True)] if start else fresh
        )
        return replace(prefix, layers=tuple(layers))

    def _joined(self, prefixes: list[Prefix], lengths: list[int]) -> DynamicCache:
        if len(prefixes) == 1:
            return prefixes[0].past_key_values
        plan = plan_batch(lengths, [prefix.tokens for prefix in prefixes])
        return stack(self.decoder.config, [prefix.layers for prefix in prefixes], plan)


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
