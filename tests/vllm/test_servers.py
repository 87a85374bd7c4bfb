"""Two OpenAI servers share: over a folder, and over our daemon, which is killed and comes back."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def prompt(number: int, length: int = LENGTH) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


def words(token_ids: Sequence[int]) -> str:
    """As the tokenizer reads and writes them."""
    return " ".join(f"w{token}" for token in token_ids)


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
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
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
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


@dataclass(frozen=True)
class World:
    """Two models on disk, their policy, and the transformers door on both."""

    sender: Path
    receiver: Path
    policies: Path
    source: str
    sending: DroidSpeak
    receiving: DroidSpeak

    @property
    def shared(self) -> dict[str, Any]:
        """What the receiver tells of a prompt that the sender has prefilled."""
        return {
            "status": "applied",
            "reason": "cross_model_hit",
            "exact_tokens": 0,
            "shared_tokens": SHARED,
            "plan": PLAN,
            "source": self.source,
        }

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
    assert answer.told == world.shared
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


def test_tiers_and_queues(pair):
    pair.send(15)
    name, held = "remote" if pair.daemon else "disk", len(pair.keys())
    wait_for(lambda: sampled(pair.sender, "tier_chunks", tier=name) == held, "the tier's chunks")
    # A server's scheduler and worker are two processes, and one of them saves.
    assert sampled(pair.sender, "tier_up", tier=name) == 1
    assert sampled(pair.sender, "write_queue_capacity_bytes", tier=name) == 1 << 30
    assert sampled(pair.sender, "save_queue_capacity_bytes") == 2 << 30
    assert sampled(pair.sender, "save_queue_bytes") == 0


def test_a_corrupt_chunk_is_counted(pair):
    if pair.daemon:
        pytest.skip("the daemon counts it")
    before = set(pair.keys())
    pair.send(16)
    with closing(open_tier(pair.tier)) as tier:
        file = tier.path((set(pair.keys()) - before).pop())
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    assert ask(pair.receiver, prompt(16)).status == ("fallback_reprefill", "corrupt")
    wait_for(
        lambda: sampled(pair.receiver, "store_events_total", tier="disk", event="corrupt") == 1, "its count"
    )
    held = len(pair.keys())
    wait_for(lambda: sampled(pair.receiver, "tier_chunks", tier="disk") == held, "what is left")


def sampled(server: Server, name: str, **labels: str) -> float | None:
    """The value of a metric of the table, as of one more step."""
    ask(server, prompt(3, 16), 1)
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"droidspeak_{name}" and labels.items() <= sample.labels.items()
    ]
    return values[0] if values else None


def settled_events(server: Server) -> dict[tuple[str, str], int]:
    """With all requests before this call. Counts travel with engine steps, so the last ones need others."""
    for _ in range(TICKS):
        ask(server, prompt(3, 16), 1)
    return events(server)


# --- all forms of an answer ---

SENT, ALSO_SENT, UNKNOWN = 23, 27, 28
FORMS = ["completions", "chat/completions", "responses", "messages"]


def asks(form: str, number: int) -> dict[str, Any]:
    """What a request of this form has for a prompt."""
    if form == "completions":
        return {"prompt": prompt(number)}
    if form == "responses":
        return {"input": words(prompt(number)), "max_output_tokens": TOKENS}
    return {"messages": [{"role": "user", "content": words(prompt(number))}]}


@pytest.fixture(scope="module")
def mixed(world, pair) -> str:
    """The receiver's answer to a prompt that its server can share, in words."""
    if pair.daemon is not None:
        pytest.skip("the form of an answer has nothing to do with the store")
    pair.send(SENT, ALSO_SENT)
    return words(world.tokens(SENT, share=True))


def post(pair: Pair, form: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    """The receiver's greedy answer; `options` are the request's `droidspeak` ones."""
    given = {"model": "it", "max_tokens": TOKENS, "temperature": 0, **body}
    given["kv_transfer_params"] = {"droidspeak": options}
    return httpx.post(f"{pair.receiver.url}/v1/{form}", json=given, timeout=60).raise_for_status()


def told(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["kv_transfer_params"]["droidspeak"]


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_answer_tells_what_became_of_its_request(world, pair, mixed, form):
    answer = post(pair, form, asks(form, SENT))
    assert (told(answer.json()), mixed in answer.text) == (world.shared, True)
    assert told(post(pair, form, asks(form, ALSO_SENT), share=False).json())["reason"] == "opted_out"


@pytest.mark.parametrize("form", FORMS)
def test_of_streams_only_that_of_a_response_tells_it(world, pair, mixed, form):
    answer = post(pair, form, {**asks(form, SENT), "stream": True}).text
    if form == "responses":
        last = json.loads(answer.rpartition("data: ")[2])
        assert (last["type"], told(last["response"])) == ("response.completed", world.shared)
    else:
        assert "kv_transfer_params" not in answer
        assert re.findall(r" (w[0-9]+)", answer) == mixed.split()


def item(outcome: dict[str, Any]) -> str:
    """As the header has it."""
    tokens = f"exact_tokens={outcome['exact_tokens']};shared_tokens={outcome['shared_tokens']}"
    named = "".join(f';{name}="{outcome[name]}"' for name in ("plan", "source") if outcome[name])
    return f"{outcome['status']};reason={outcome['reason']};{tokens}{named}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_head_of_every_answer_tells_it(world, pair, mixed, form, stream):
    answers = [
        post(pair, form, {**asks(form, SENT), "stream": stream}),
        post(pair, form, {**asks(form, ALSO_SENT), "stream": stream}, share=False),
    ]
    heads = [answer.headers.get("X-DroidSpeak", "") for answer in answers]
    if form == "responses" and stream:
        assert heads == ["", ""]  # it begins before the engine does, and tells it in its last event
    else:
        assert heads[0] == item(world.shared)
        assert heads[1].startswith("fallback_reprefill;reason=opted_out;")


def test_the_head_tells_what_the_answer_does_not(world, pair, mixed):
    shared = item(world.shared)
    stopped = post(pair, "completions", {**asks("completions", SENT), "stop": [mixed.split()[1]]})
    assert stopped.headers["X-DroidSpeak"] == shared
    chats = {"messages": [asks("chat/completions", SENT)["messages"]] * 2}
    assert post(pair, "chat/completions/batch", chats).headers["X-DroidSpeak"] == f"{shared}, {shared}"
    both = {"prompt": [prompt(SENT), prompt(29)], "request_id": "mine-7"}
    first, second = post(pair, "completions", both).headers.get_list("X-DroidSpeak", split_commas=True)
    assert (first, second.split(";")[1]) == (shared, "reason=miss")
    health = httpx.get(f"{pair.receiver.url}/health", timeout=60)
    assert "X-DroidSpeak" not in health.headers


def test_which_of_several_answers_is_told(world, pair, mixed):
    for form in ("completions", "chat/completions"):
        two = {**asks(form, SENT), "n": 2, "temperature": 1}
        assert told(post(pair, form, two).json()) == world.shared
    both = prompt(SENT), prompt(UNKNOWN)
    assert told(post(pair, "completions", {"prompt": both}).json()) == world.shared
    assert told(post(pair, "completions", {"prompt": both[::-1]}).json())["reason"] == "miss"


@pytest.mark.parametrize("form", ["completions", "chat/completions"])
def test_an_answer_that_a_stop_string_ends_is_not_told(world, pair, mixed, form):
    first, second = mixed.split()[:2]
    cut = post(pair, form, {**asks(form, SENT), "stop": [second]})
    assert cut.json()["kv_transfer_params"] is None
    assert (first in cut.text, cut.json()["choices"][0]["stop_reason"]) == (True, second)
    by_token = {**asks(form, SENT), "stop_token_ids": [int(second.removeprefix("w"))]}
    assert told(post(pair, form, by_token).json()) == world.shared


def test_a_batch_of_chats_is_not_told(pair, mixed):
    chats = {"messages": [asks("chat/completions", SENT)["messages"]] * 2}
    answer = post(pair, "chat/completions/batch", chats)
    assert (answer.json()["kv_transfer_params"], answer.text.count(mixed)) == (None, 2)


def test_options_of_streams_and_batches_count_and_those_of_beam_search_do_not(pair, mixed):
    before = opted_out(pair.receiver)
    for form in FORMS:
        post(pair, form, {**asks(form, ALSO_SENT), "stream": True}, share=False)
    chats = {"messages": [asks("chat/completions", ALSO_SENT)["messages"]] * 2}
    post(pair, "chat/completions/batch", chats, share=False)
    beams = {**asks("completions", SENT), "use_beam_search": True, "n": 2, "max_tokens": 2}
    answer = post(pair, "completions", beams, share=False).json()
    assert (answer["kv_transfer_params"], len(answer["choices"])) == (None, 2)
    assert opted_out(pair.receiver) == before + len(FORMS) + 2


def opted_out(server: Server) -> int:
    return settled_events(server).get(("reasons", "opted_out"), 0)


# --- when the store fails ---


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
