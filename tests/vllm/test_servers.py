"""Two OpenAI servers share: over a folder, and over our daemon, which is killed and comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from droidspeak.connector import ConnectorOptions
from droidspeak.integrations.transformers import DroidSpeak
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import ChunkKey, SourceManifest
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.urls import open_tier

from .processes import Daemon, Server, ask, events, serving, start, wait_for

LAYERS, VOCABULARY, CHUNK = 4, 256, 64
LENGTH, SHARED, CHUNKS = 230, 192, 3
PLAN = "1-2"
TOKENS, TICKS = 8, 2
MARGIN = 0.005  # logits; engines differ by 1e-4
MISS, HIT = ("fallback_reprefill", "miss"), ("applied", "cross_model_hit")


def prompt(number: int, length: int = LENGTH) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


# --- what is right, by transformers ---


def save_models(root: Path) -> tuple[Path, Path]:
    """A sender and a receiver that is near it, with a tokenizer of plain words."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    scale(model, lambda weights: weights * 3)
    save(model, tokenizer, root / "sender")
    scale(model, lambda weights: weights + 0.3 * weights.std() * torch.randn_like(weights))
    save(model, tokenizer, root / "receiver")
    return root / "sender", root / "receiver"


def scale(model, change) -> None:
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.copy_(change(weights))


def save(model, tokenizer, folder) -> None:
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@dataclass(frozen=True)
class World:
    """Two models on disk, their policy, and the transformers door on both."""

    sender: Path
    receiver: Path
    policies: Path
    source: str
    sending: DroidSpeak
    receiving: DroidSpeak

    def tokens(self, number: int, *, share: bool) -> list[int]:
        """What the receiver says to a prompt, its prefix mixed by the plan or its own."""
        ids = torch.tensor(prompt(number))
        if share:
            self.sending.prefill(ids)
            self.sending.connector.flush()
        prefix = self.receiving.prefill(ids, share=share)
        assert prefix.outcome.shared_tokens == (SHARED if share else 0)
        return greedy(self.receiving.model, ids, prefix)


def greedy(model, ids, prefix) -> list[int]:
    cache, said = prefix.past_key_values, []
    rest = ids[prefix.tokens :]
    with torch.no_grad():
        while len(said) < TOKENS:
            logits = model(rest[None], past_key_values=cache).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] > MARGIN, "no engine must agree with another on this prompt"
            said.append(int(logits.argmax()))
            rest = torch.tensor(said[-1:])
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    folders = save_models(root)
    mine, theirs = (SourceManifest.from_folder(folder) for folder in folders)
    (root / "policies").mkdir()
    policy = Policy.fixed(mine.source_id, theirs.source_id, Plan.parse(PLAN, LAYERS))
    write_policy(
        root / "policies" / "pair.json", policy, Side.of("sender", mine), Side.of("receiver", theirs)
    )
    store, options = MemoryTier(1 << 28), ConnectorOptions(chunk_size=CHUNK)
    sending, receiving = (
        DroidSpeak(
            LlamaForCausalLM.from_pretrained(folder).eval(),
            store,
            PolicySet([policy]),
            folder=folder,
            options=options,
            save=folder == folders[0],
        )
        for folder in folders
    )
    with sending, receiving:
        yield World(*folders, root / "policies", mine.source_id, sending, receiving)


# --- the servers ---


@dataclass(frozen=True)
class Pair:
    """A sender's and a receiver's server on one store; `daemon` if there is one between."""

    sender: Server
    receiver: Server
    tier: str
    daemon: Daemon | None

    def send(self, *numbers: int) -> None:
        """Prefills prompts at the sender, and waits until the store has them."""
        expected = len(self.keys()) + CHUNKS * len(numbers)
        for number in numbers:
            assert ask(self.sender, prompt(number), 1).status[0] != "applied"
        wait_for(lambda: len(self.keys()) == expected, "the sender's chunks")

    def keys(self) -> list[ChunkKey]:
        """Of all chunks in the store."""
        with closing(open_tier(self.tier)) as tier:
            return list(tier.keys())


@pytest.fixture(scope="module", params=["folder", "daemon"])
def pair(request, world, tmp_path_factory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp(request.param)
    daemon = Daemon(root / "store") if request.param == "daemon" else None
    tier = daemon.url if daemon else f"disk://{root}/store?min_free=0"
    config = root / "droidspeak.yaml"
    config.write_text(f"policies: {world.policies}\nchunk_size: {CHUNK}\nlimits: {{}}\n")
    if daemon:
        config.write_text(config.read_text().replace("{}", "{remote: {cooldown: 0.5, max_cooldown: 0.5}}"))
    arguments = ["--config", config, "--tier", tier]
    sender = start(world.sender, "sender", root / "sender.log", *arguments)
    receiver = start(world.receiver, "receiver", root / "receiver.log", *arguments)
    try:
        with serving(sender, receiver):
            yield Pair(sender, receiver, tier, daemon)
    finally:
        if daemon:
            daemon.kill()


def test_a_receiver_uses_what_the_sender_has_prefilled(world, pair):
    mixed, own = world.tokens(1, share=True), world.tokens(1, share=False)
    assert mixed != own
    pair.send(1)
    answer = ask(pair.receiver, prompt(1))
    assert answer.told == {
        "status": "applied",
        "reason": "cross_model_hit",
        "exact_tokens": 0,
        "shared_tokens": SHARED,
        "plan": PLAN,
        "source": world.source,
    }
    assert answer.tokens == mixed
    # The next one is shared again: nothing mixed may pass for the receiver's own.
    assert ask(pair.receiver, prompt(1)) == answer
    refused = ask(pair.receiver, prompt(1), share=False)
    assert (refused.tokens, refused.status) == (own, ("fallback_reprefill", "opted_out"))
    assert refused.told["plan"] is refused.told["source"] is None


def test_what_nobody_has_prefilled(world, pair):
    answer = ask(pair.receiver, prompt(2))
    assert (answer.tokens, answer.status) == (world.tokens(2, share=False), MISS)
    assert ask(pair.receiver, prompt(3, CHUNK)).status == ("fallback_reprefill", "too_short")


def test_metrics_count_requests(pair):
    pair.send(4, 5)
    before = settled_events(pair.receiver)
    for number, options in ((4, {}), (5, {}), (5, {"share": False}), (6, {})):
        ask(pair.receiver, prompt(number), **options)
    after = settled_events(pair.receiver)
    rise = {name: after[name] - before.get(name, 0) for name in after}
    assert rise.pop(("bytes_loaded", "")) > 0
    ticks = [rise.pop(name) for name in (("requests", "fallback_reprefill"), ("reasons", "too_short"))]
    assert ticks[0] == ticks[1] + 2
    assert {name: count for name, count in rise.items() if count} == {
        ("requests", "applied"): 2,
        ("reasons", "cross_model_hit"): 2,
        ("reasons", "opted_out"): 1,
        ("reasons", "miss"): 1,
        ("shared_tokens", ""): 2 * SHARED,
    }
    stored = len(pair.keys())
    wait_for(lambda: settled_events(pair.sender).get(("chunks_saved", "")) == stored, "chunks_saved", 20)
    assert not any(event in ("save_failures", "lookup_failures") for event, _ in events(pair.sender))


def test_metrics_of_the_table(pair):
    pair.send(14)
    ask(pair.receiver, prompt(14))
    settled_events(pair.receiver)
    text = httpx.get(f"{pair.receiver.url}/metrics", timeout=60).text
    found = {
        sample.name: sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("droidspeak_") and sample.value
    }
    names = ("requests_total", "hit_tokens_total", "load_bytes_total", "lookup_seconds_count")
    assert {f"droidspeak_{name}" for name in names} <= found.keys()
    assert {"model_name", "engine", "source", "receiver"} == found[
        "droidspeak_hit_tokens_total"
    ].labels.keys()


def settled_events(server: Server) -> dict[tuple[str, str], int]:
    """With all requests before this call. Counts travel with engine steps, so the last ones need others."""
    for _ in range(TICKS):
        ask(server, prompt(3, 16), 1)
    return events(server)


def test_a_daemon_that_dies_and_comes_back(world, pair):
    if pair.daemon is None:
        pytest.skip("there is no daemon")
    pair.send(7, 8)
    assert ask(pair.receiver, prompt(7)).status == HIT
    pair.daemon.kill()
    answer = ask(pair.receiver, prompt(8))
    assert (answer.tokens, answer.status) == (
        world.tokens(8, share=False),
        ("fallback_reprefill", "store_unavailable"),
    )
    # The sender, too, goes on; what it prefills now is lost.
    assert ask(pair.sender, prompt(9)).status[0] == "fallback_reprefill"
    pair.daemon.start()
    unknown = iter(range(100, 1000))
    wait_for(lambda: ask(pair.receiver, prompt(next(unknown)), 1).status == MISS, "the daemon")
    again = ask(pair.receiver, prompt(7))
    assert (again.tokens, again.status) == (world.tokens(7, share=True), HIT)
    pair.send(10)
    assert ask(pair.receiver, prompt(10)).status == HIT
