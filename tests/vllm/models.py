"""Tiny models on disk, prompts, policies, and what the transformers door makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.integrations.transformers import DroidSpeak, Prefix, PrefixKV, capture
from droidspeak.layerselect import FrontierPoint, MapFile, Plan, Policy, PolicySet
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.layerselect.mapfeatures import MapFeatures, columns
from droidspeak.layerselect.mapping import Maps
from droidspeak.layerselect.ridge import LinearMap
from droidspeak.storage import ChunkKey, PrefixHasher, Slot, SlotKind, SourceManifest, Tier

from .engine import Answer

VOCABULARY, LAYERS, HIDDEN = 256, 4, 128
WINDOW = 96
NEAR = 1e-4
MARGIN = 0.005  # of the best token's logit; engines differ by less than `NEAR`

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": partial(MistralConfig, sliding_window=None),
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "windows": partial(MistralConfig, sliding_window=WINDOW),
    "mixed": partial(Gemma3TextConfig, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=32),
    # As vLLM runs it; for transformers every layer of it has full attention.
    "mixed_llama": partial(LlamaConfig, sliding_window=WINDOW, layer_types=_MIXED),
}


def prompt(number: int, length: int) -> list[int]:
    """Token ids; the same for the same number, and of a longer prompt the first ones."""
    draw = random.Random(number)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


def save_model(
    folder: Path, architecture: str = "llama", *, noise: float = 0.0, dtype: torch.dtype = torch.float32
) -> Path:
    """A model whose answers are not decided by rounding; those with little noise are near to each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_ARCHITECTURES[architecture](**_SHAPE))
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.data *= 3
        torch.manual_seed(1)
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.data += noise * weights.std() * torch.randn_like(weights)
        model.to(dtype).save_pretrained(folder)
    return folder


@cache
def load(folder: Path) -> Any:
    """The model by transformers, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def keys_of(
    source: SourceManifest, token_ids: Sequence[int], size: int, salt: str = "", shard: str = "0of1"
) -> list[ChunkKey]:
    """Of all whole chunks of a prompt."""
    return [ChunkKey(source.source_id, shard, link) for link in PrefixHasher(size, salt).hashes(token_ids)]


def renamed(manifest: SourceManifest, name: str) -> SourceManifest:
    """The same model as far as numbers go, under weights of another name."""
    return replace(manifest, weights=f"{name} of {manifest.weights}")


def write_plan(
    folder: Path,
    sender: SourceManifest,
    receiver: SourceManifest,
    plan: str,
    quality: float = 1.0,
    *,
    maps: MapFile | None = None,
    also: Mapping[str, float] | None = None,
) -> str:
    """Writes a policy of one plan, and others of less quality; returns the folder as configuration has it."""
    folder.mkdir(exist_ok=True)
    plans = {**(also or {}), plan: quality}
    points = tuple(
        FrontierPoint(Plan.parse(text, sender.architecture.layers), score) for text, score in plans.items()
    )
    policy = Policy(sender.source_id, receiver.source_id, points, maps=maps)
    path = folder / f"{sender.source_id[:12]}-{receiver.source_id[:12]}.json"
    write_policy(path, policy, Side.of("sender", sender), Side.of("receiver", receiver))
    return str(folder)


def write_maps(path: Path, kind: MapFeatures, sender: SourceManifest, receiver: SourceManifest) -> MapFile:
    """Maps of all layers that make no sense, and are the same for the same kind."""
    path.parent.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(5)

    def linear(mapped: int, outputs: int) -> LinearMap:
        features = columns(kind, mapped, HIDDEN)
        weight = torch.randn(features, outputs, generator=draw) / features**0.5
        return LinearMap(weight, torch.randn(outputs, generator=draw) / 4)

    kv = 2 * sender.architecture.kv_heads * sender.architecture.head_dim
    e_maps = {layer: linear(2 * HIDDEN, HIDDEN) for layer in range(1, LAYERS)}
    kv_maps = {layer: linear(kv, kv) for layer in range(LAYERS)}
    return Maps(kind, e_maps, kv_maps, (sender.source_id, receiver.source_id)).save(path)


def store_prefill(
    tier: Tier, folder: Path, source: SourceManifest, token_ids: Sequence[int], size: int, *, ranks: int = 1
) -> None:
    """Stores the whole chunks that the model of `folder` prefills, with E of all layers, as `source`'s."""
    prefix = capture(load(folder), torch.tensor(token_ids), range(LAYERS))
    for rank in range(ranks):
        options = ConnectorOptions(chunk_size=size, shard=f"{rank}of{ranks}")
        connector = Connector(tier, _EveryLayer(), options)
        session = connector.save(token_ids, source)
        for layer, pair in enumerate(prefix.layers):
            k, v = (rows.chunk(ranks, dim=1)[rank] for rows in pair)
            session.put(layer, k, v, prefix.inputs[layer])
        assert session.finish(wait=True) == len(token_ids) // size
        connector.close()


class _EveryLayer:
    """Stands for policies that want E of every layer."""

    @staticmethod
    def transition_layers(_source: str) -> frozenset[int]:
        return frozenset(range(1, LAYERS))


def stored(
    tier: Tier, keys: Iterable[ChunkKey], e_layers: Iterable[int] = (), *, layers: int = LAYERS
) -> PrefixKV:
    """All rows of these chunks."""
    slots = [*Slot.kv(range(layers)), *(Slot(SlotKind.E, layer) for layer in e_layers)]
    chunks = [tier.read(key, slots) for key in keys]
    rows = {slot: torch.cat([chunk.tensor(slot) for chunk in chunks if chunk]) for slot in slots}
    pairs = [(rows[k], rows[v]) for k, v in (Slot.kv([layer]) for layer in range(layers))]
    return PrefixKV(pairs, {slot.layer: rows[slot] for slot in slots if slot.kind is SlotKind.E})


@dataclass(frozen=True)
class Reference:
    """What is right.

    Attributes:
        tokens: the greedy ones, up to the first that rounding decides.
        logprobs: of every token, at the places of `tokens` and of the one after.
    """

    tokens: list[int]
    logprobs: torch.Tensor


@torch.no_grad()
def answer(model: Any, token_ids: Sequence[int], prefix: Prefix | None = None, new: int = 6) -> Reference:
    """The answer of `model` over `prefix`, or over its own prefill of all."""
    cache = prefix.past_key_values if prefix is not None else None
    rest = torch.tensor(token_ids)[prefix.tokens if prefix is not None else 0 :]
    said: list[int] = []
    logprobs = []
    while len(said) < new:
        out = model(rest[None], past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        logprobs.append(logits.log_softmax(-1))
        best = logits.topk(2).values
        if best[0] - best[1] < MARGIN:
            break
        said.append(int(logits.argmax()))
        rest = torch.tensor(said[-1:])
    return Reference(said, torch.stack(logprobs))


def door(
    folder: Path, tier: Tier, size: int, policies: Path | str | None = None, *, save: bool = False
) -> DroidSpeak:
    """The transformers door on a model's folder."""
    followed = None if policies is None else PolicySet.from_folder(Path(policies))
    options = ConnectorOptions(chunk_size=size)
    return DroidSpeak(load(folder), tier, followed, folder=folder, options=options, save=save)


def assert_near(mine: PrefixKV, right: PrefixKV, near: float = NEAR) -> None:
    """K, V and E of the tokens that both have, and E of the same layers."""
    assert mine.inputs.keys() == right.inputs.keys()
    layers = zip(mine.layers, right.layers, strict=True)
    pairs = [pair for one, other in layers for pair in zip(one, other, strict=True)]
    pairs += [(mine.inputs[layer], right.inputs[layer]) for layer in mine.inputs]
    for one, other in pairs:
        torch.testing.assert_close(one, other[: len(one)], rtol=0, atol=near)


def logits_of(answer: Answer) -> torch.Tensor:
    """Of an engine with `logprobs_mode="raw_logits"` that was asked for all: `[places, vocabulary]`."""
    return torch.tensor([[place[token] for token in range(VOCABULARY)] for place in answer.logprobs])


def assert_said(answer: Answer, right: Reference, near: float = NEAR) -> None:
    """The same tokens, with the same probabilities."""
    assert answer.tokens[: len(right.tokens)] == right.tokens
    for place, logprobs in enumerate(right.logprobs):
        for token, logprob in answer.logprobs[place].items():
            assert abs(float(logprobs[token]) - logprob) < near, (place, token)


def assert_same(one: Answer, other: Answer, near: float = NEAR) -> None:
    """Two answers of engines, up to the first token that rounding decides."""
    for place, (mine, theirs) in enumerate(zip(one.logprobs, other.logprobs, strict=True)):
        assert all(abs(mine[token] - theirs[token]) < near for token in mine.keys() & theirs.keys()), place
        first, second = sorted(mine.values())[:-3:-1]
        if first - second < MARGIN:
            return
        assert one.tokens[place] == other.tokens[place]
