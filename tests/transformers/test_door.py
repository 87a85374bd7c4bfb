"""The door: what a request gets, from whom, what is saved, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
from transformers import GenerationConfig

from droidspeak.connector import Reason, Status
from droidspeak.errors import UsageError
from droidspeak.integrations.transformers import Decoder, capture, manifest_of, past_key_values
from droidspeak.integrations.transformers.answer import answer
from droidspeak.layerselect import FrontierPoint, Plan, Policy, PolicySet, Requirement
from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier

from .sharing import (
    NEW,
    SIZE,
    ask,
    door,
    fill,
    greedy,
    left_padded,
    logits_after,
    memory,
    own_logits,
    policy,
    sources_in,
)
from .tiny_models import ARCHITECTURES, tiny_model, tokens

IDS = tokens(4 * SIZE + 5, seed=1)
MINE, THEIRS = tiny_model("llama"), tiny_model("llama", seed=7)


def sharing(plan: str = "1-2", **options):
    """A sender and a receiver on one store, with a policy for the pair."""
    store, policies = memory(), PolicySet()
    sender, receiver = door(THEIRS, store, policies), door(MINE, store, policies, **options)
    policies.add(policy(sender, receiver, plan))
    return sender, receiver


# Own, another's, and the rest


def reference(mine, theirs, plan: Plan, exact: int, shared: int):
    """K and V of the leading tokens of `IDS`, put together from the primitives of `Decoder`."""
    decoder, end = Decoder(mine), exact + shared
    own = capture(mine, IDS[:exact]).layers
    sent = capture(theirs, IDS[:end], range(decoder.num_layers))
    rest = [(k[exact:], v[exact:]) for k, v in sent.layers]
    for group in plan.groups:
        e = sent.e(group.start)[exact:] if group.start else None
        rest[group.start : group.end + 1] = decoder.recompute(
            IDS[exact:end], group.start, group.end, e=e, past=own
        )
    return [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(own, rest, strict=True)]


@pytest.mark.parametrize("plan", ["reuse", "0-1", "1-1", "2-3", "0-0,2-2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_own_chunks_then_another_models_then_prefill(architecture, plan):
    store, policies = memory(), PolicySet()
    theirs, mine = tiny_model(architecture, seed=7), tiny_model(architecture)
    sender, receiver = door(theirs, store, policies), door(mine, store, policies)
    policies.add(policy(sender, receiver, plan))
    fill(receiver, IDS[: SIZE + 1])
    fill(sender, IDS[: 3 * SIZE + 1])
    prefix = receiver.prefill(IDS)
    outcome = prefix.outcome
    assert (outcome.reason, outcome.exact_tokens, outcome.shared_tokens, prefix.tokens) == (
        Reason.CROSS_MODEL_HIT,
        SIZE,
        2 * SIZE,
        3 * SIZE,
    )
    layers = reference(mine, theirs, outcome.plan, SIZE, 2 * SIZE)
    cache = past_key_values(receiver.decoder.config, layers)
    with torch.no_grad():
        expected = mine(IDS[None, 3 * SIZE :], past_key_values=cache).logits[0]
    assert torch.equal(logits_after(mine, prefix, IDS), expected)
    receiver.flush()
    assert store.usage().chunks == 3 + 1


def test_own_chunks_are_continued_and_saved():
    store = memory()
    droid = door(MINE, store)
    fill(droid, IDS[: 2 * SIZE + 1])
    prefix = droid.prefill(IDS)
    assert (prefix.outcome.reason, prefix.outcome.exact_tokens, prefix.tokens) == (
        Reason.EXACT_HIT,
        2 * SIZE,
        4 * SIZE,
    )
    torch.testing.assert_close(logits_after(MINE, prefix, IDS), own_logits(MINE, IDS, 4 * SIZE))
    droid.flush()
    assert droid.prefill(IDS).outcome.exact_tokens == 4 * SIZE


def test_another_prompt_shares_only_what_it_begins_with():
    droid = door(MINE, memory())
    fill(droid, IDS)
    other = torch.cat([IDS[: 2 * SIZE + 3], tokens(30, seed=5)])
    sequences, outcome = ask(droid, other)
    assert outcome.exact_tokens == 2 * SIZE
    assert torch.equal(sequences, greedy(MINE, other[None]))


# What is approximate stays with its request


def test_nothing_approximate_is_saved_or_seen_by_later_requests():
    sender, receiver = sharing()
    store = receiver.connector.store
    plain = greedy(MINE, IDS[None])
    fill(sender, IDS[: 2 * SIZE + 1])
    mixed, outcome = ask(receiver, IDS)
    assert (outcome.reason, outcome.status) == (Reason.CROSS_MODEL_HIT, Status.APPLIED)
    assert not torch.equal(mixed, plain)
    receiver.flush()
    assert sources_in(store) == {sender.manifest.source_id}

    own, outcome = ask(receiver, IDS, share=False)
    assert (outcome.reason, outcome.status) == (Reason.OPTED_OUT, Status.FALLBACK_REPREFILL)
    assert torch.equal(own, plain)
    receiver.flush()
    again, outcome = ask(receiver, IDS)
    assert (outcome.reason, outcome.exact_tokens) == (Reason.EXACT_HIT, 4 * SIZE)
    assert torch.equal(again, plain)


def test_using_a_prefix_does_not_change_it():
    sender, receiver = sharing()
    fill(sender, IDS)
    for prefix in (sender.prefill(IDS), receiver.prefill(IDS), receiver.prefill(IDS[:5])):
        before = [(k.clone(), v.clone()) for k, v in prefix.layers]
        first = logits_after(receiver.model, prefix, IDS)
        receiver.model.generate(IDS[None], past_key_values=prefix.past_key_values, max_new_tokens=3)
        assert torch.equal(logits_after(receiver.model, prefix, IDS), first)
        assert all(map(torch.equal, chain(*prefix.layers), chain(*before)))


def test_what_a_request_does_with_its_prefix_stays_out_of_the_store():
    droid = door(MINE, memory())
    fill(droid, IDS)
    for prefix in (droid.prefill(IDS[:40]), droid.prefill(IDS)):
        for state in chain(*prefix.layers):
            state.fill_(7)
    sequences, outcome = ask(droid, IDS)
    assert outcome.reason is Reason.EXACT_HIT
    assert torch.equal(sequences, greedy(MINE, IDS[None]))


@pytest.mark.parametrize("plan", ["reuse", "0-1", "2-3"])
def test_an_approximate_request_changes_no_chunk(plan):
    sender, receiver = sharing(plan)
    store = receiver.connector.store
    fill(sender, IDS)
    held = list(store.keys())
    before = [store.read(key).to_bytes() for key in held]
    assert ask(receiver, IDS)[1].reason is Reason.CROSS_MODEL_HIT
    receiver.flush()
    assert list(store.keys()) == held
    assert [store.read(key).to_bytes() for key in held] == before


# What a call asks for


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE])
def test_short_prompts(length):
    sender, receiver = sharing()
    fill(sender, IDS)
    sequences, outcome = ask(receiver, IDS[:length])
    assert (outcome.reason, outcome.status) == (Reason.TOO_SHORT, Status.FALLBACK_REPREFILL)
    assert torch.equal(sequences, greedy(MINE, IDS[None, :length]))


def test_salt():
    sender, receiver = sharing()
    sender.prefill(IDS, salt="tenant")
    sender.flush()
    assert receiver.prefill(IDS).outcome.reason is Reason.MISS
    assert receiver.prefill(IDS, salt="other").outcome.reason is Reason.MISS
    assert receiver.prefill(IDS, salt="tenant").outcome.shared_tokens == 4 * SIZE


def test_sender():
    sender, receiver = sharing(save=False)
    fill(sender, IDS)
    stranger = manifest_of(tiny_model("llama", seed=3))
    other_kind = manifest_of(tiny_model("qwen3"))
    for manifest, reason, status in (
        (sender.manifest, Reason.CROSS_MODEL_HIT, Status.APPLIED),
        (stranger, Reason.NO_POLICY, Status.UNSUPPORTED),
        (other_kind, Reason.OTHER_ARCHITECTURE, Status.UNSUPPORTED),
    ):
        outcome = receiver.prefill(IDS, sender=manifest).outcome
        assert (outcome.reason, outcome.status) == (reason, status)


def test_quality_floor_of_the_door_and_of_the_call():
    sender, receiver = sharing(requirement=Requirement(0.5), save=False)
    points = tuple(
        FrontierPoint(Plan.parse(text, 4), quality) for text, quality in (("1-1", 0.6), ("1-2", 0.9))
    )
    receiver.connector.policies.add(Policy(sender.manifest.source_id, receiver.manifest.source_id, points))
    fill(sender, IDS)
    for requirement, plan in ((None, "1-1"), (Requirement(0.8), "1-2")):
        assert str(receiver.prefill(IDS, requirement=requirement).outcome.plan) == plan
    assert receiver.prefill(IDS, requirement=Requirement(0.95)).outcome.reason is Reason.BELOW_FLOOR


def test_e_that_was_not_stored():
    sender, receiver = sharing("0-1")
    fill(sender, IDS)
    receiver.connector.policies.add(policy(sender, receiver, "1-2"))
    sequences, outcome = ask(receiver, IDS)
    assert outcome.reason is Reason.E_MISSING
    assert torch.equal(sequences, greedy(MINE, IDS[None]))


def test_a_door_that_does_not_save():
    store = memory()
    droid = door(MINE, store, save=False)
    fill(droid, IDS)
    assert sources_in(store) == set()


def test_a_model_that_cannot_be_identified(tmp_path, caplog):
    """An empty folder: nothing is shared, nothing is saved, the answer is right."""
    store = memory()
    droid = door(MINE, store, folder=tmp_path)
    for _ in range(2):
        sequences, outcome = ask(droid, IDS)
        assert (outcome.reason, outcome.status) == (Reason.UNKNOWN_WEIGHTS, Status.UNSUPPORTED)
        assert torch.equal(sequences, greedy(MINE, IDS[None]))
    droid.flush()
    assert droid.manifest is None
    assert sources_in(store) == set()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_outcomes_are_counted_and_measured():
    sender, receiver = sharing()
    fill(sender, IDS)
    outcome = receiver.prefill(IDS).outcome
    kv_of_two_layers, e = 2 * 2 * 4 * SIZE * 16 * 4, 4 * SIZE * 32 * 4
    assert outcome.bytes_loaded == kv_of_two_layers + e
    assert outcome.wait_seconds >= 0
    assert (outcome.tokens, outcome.source) == (len(IDS), sender.manifest.source_id)
    snapshot = receiver.connector.counters.snapshot()
    assert snapshot["requests"] == {"applied": 1}
    assert snapshot["reasons"] == {"cross_model_hit": 1}
    assert snapshot["shared_tokens"] == {sender.manifest.source_id: 4 * SIZE}
    assert snapshot["bytes_loaded"] == {"": outcome.bytes_loaded}


@pytest.mark.parametrize("kind", [list, lambda ids: ids.to(torch.int32), lambda ids: ids.numpy()])
def test_kinds_of_token_ids(kind):
    droid = door(MINE, memory())
    fill(droid, IDS)
    assert droid.prefill(kind(IDS)).outcome.exact_tokens == 4 * SIZE


def test_half_precision():
    model = tiny_model("llama").to(torch.bfloat16)
    droid = door(model, memory())
    expected = greedy(model, IDS[None])
    for reason in (Reason.MISS, Reason.EXACT_HIT):
        sequences, outcome = ask(droid, IDS)
        assert outcome.reason is reason
        assert torch.equal(sequences, expected)
        droid.flush()
    assert droid.manifest != door(MINE, memory()).manifest


# Generation


def test_a_batch_shares_row_by_row():
    """Each row is what its own request would have been: nothing leaks from row to row."""
    sender, receiver = sharing(save=False)
    prompts = [IDS, tokens(40, seed=2), IDS[: 2 * SIZE + 9]]
    fill(sender, prompts[0])
    input_ids, mask = left_padded(prompts)
    result = receiver.generate(input_ids, mask, max_new_tokens=NEW, do_sample=False)
    assert [outcome.reason for outcome in result.outcomes] == [
        Reason.CROSS_MODEL_HIT,
        Reason.MISS,
        Reason.CROSS_MODEL_HIT,
    ]
    assert torch.equal(result.sequences[1, -NEW:], greedy(MINE, prompts[1][None])[0, -NEW:])


def test_rows_that_leave_the_same_number_of_tokens_answer_as_they_do_alone():
    sender, receiver = sharing("0-2", save=False)
    prompts = [IDS, tokens(2 * SIZE + 5, seed=4), tokens(5, seed=5)]
    fill(sender, prompts[0])
    fill(door(MINE, receiver.connector.store), prompts[1])
    result = receiver.generate(*left_padded(prompts), max_new_tokens=NEW, do_sample=False)
    assert [outcome.reason for outcome in result.outcomes] == [
        Reason.CROSS_MODEL_HIT,
        Reason.EXACT_HIT,
        Reason.TOO_SHORT,
    ]
    for row, prompt in zip(result.sequences, prompts, strict=True):
        assert torch.equal(row[-NEW:], ask(receiver, prompt)[0][0, -NEW:])


@pytest.mark.parametrize("padding", [0, 1, SIZE])
def test_one_padded_prompt(padding):
    droid = door(MINE, memory())
    fill(droid, IDS)
    input_ids, mask = left_padded([IDS], len(IDS) + padding)
    result = droid.generate(input_ids, mask, max_new_tokens=NEW, do_sample=False)
    assert result.outcomes[0].reason is Reason.EXACT_HIT
    assert torch.equal(result.sequences, greedy(MINE, input_ids, mask))


def test_in_inference_mode():
    with torch.inference_mode():
        droid = door(tiny_model("llama"), memory())
        expected = greedy(droid.model, IDS[None])
        for reason in (Reason.MISS, Reason.EXACT_HIT):
            sequences, outcome = ask(droid, IDS)
            assert outcome.reason is reason
            assert torch.equal(sequences, expected)
            droid.flush()
    assert ask(droid, IDS)[1].reason is Reason.EXACT_HIT


def test_two_doors_on_one_folder(tmp_path):
    """As in two processes: each has its own view of the disk."""
    with (
        DiskTier(tmp_path, min_free=0) as one,
        TieredStore([memory(), DiskTier(tmp_path, min_free=0)]) as two,
    ):
        policies = PolicySet()
        sender, receiver = door(THEIRS, one, policies), door(MINE, two, policies)
        policies.add(policy(sender, receiver, "0-1"))
        with sender:
            sender.prefill(IDS)
        assert receiver.prefill(IDS).outcome.shared_tokens == 4 * SIZE


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=NEW, pad_token_id=0)},
    ],
)
def test_several_answers_to_one_prompt(options):
    droid = door(MINE, memory())
    input_ids, mask = left_padded([IDS, IDS[:20], IDS[:9]])
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    if "generation_config" in options:
        options = {"generation_config": options["generation_config"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = MINE.generate(input_ids, attention_mask=mask, **options)
        for _ in range(2):
            torch.manual_seed(0)
            assert torch.equal(droid.generate(input_ids, mask, **options).sequences, expected)
            droid.flush()


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": THEIRS},
        {"generation_config": GenerationConfig(prefill_chunk_size=8)},
    ],
)
def test_modes_that_take_no_prefix_are_refused(options):
    """They would read the prompt over its prefix and answer something else."""
    with pytest.raises(UsageError, match="prefix") as caught:
        door(MINE, memory()).generate(IDS[None], **options)
    assert "\n" not in str(caught.value)


def test_what_generate_is_asked_to_return():
    droid = door(MINE, memory())
    result = droid.generate(IDS[None], max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(result.sequences.sequences, greedy(MINE, IDS[None])[:, : len(IDS) + 2])


def test_requests_at_the_same_time():
    sender, receiver = sharing(save=False)
    fill(sender, IDS)
    expected = logits_after(MINE, receiver.prefill(IDS), IDS)
    plain = own_logits(MINE, IDS, 4 * SIZE)

    def one(share: bool) -> bool:
        prefix = receiver.prefill(IDS, share=share)
        return torch.equal(logits_after(MINE, prefix, IDS), expected if share else plain)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(one, [True, False] * 10))


def test_answer_is_greedy_and_ends_at_its_end():
    droid = door(MINE, memory())
    plain = greedy(MINE, IDS[None])[0, len(IDS) :].tolist()
    for reason in (Reason.MISS, Reason.EXACT_HIT):
        said = answer(droid, IDS.tolist(), max_new_tokens=NEW, eos_ids=())
        assert (list(said.token_ids), said.outcome.reason) == (plain, reason)
        assert said.ttft > 0
        droid.flush()
    end = plain[3]
    said = answer(droid, IDS.tolist(), max_new_tokens=NEW, eos_ids=[end])
    assert list(said.token_ids) == plain[: plain.index(end)]


# What is refused


def refuses(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_prompts():
    droid = door(MINE, memory())
    refuses(lambda: droid.prefill([]), "at least one token")
    refuses(lambda: droid.prefill(IDS[None]), "flat list")
    refuses(lambda: droid.prefill([3, -1] * 20), "token ids")
    refuses(lambda: droid.generate(IDS), "batch, width")
    refuses(lambda: droid.generate(IDS[None], torch.ones(1, 5)), "batch, width")
    refuses(lambda: droid.generate(IDS[None], torch.zeros_like(IDS[None])), "at least one token")
    right_padded = torch.ones_like(IDS[None])
    right_padded[0, -1] = 0
    refuses(lambda: droid.generate(IDS[None], right_padded), "padded on the left")


def test_a_model_in_training_mode():
    refuses(lambda: door(tiny_model("llama").train(), memory()).prefill(IDS), "training mode")


def test_the_context_manager_waits_for_what_is_saved():
    store = memory()
    with door(MINE, store) as droid:
        droid.prefill(IDS)
    assert store.usage().chunks == 4


def test_chunks_stored_before_the_policy_get_their_e_at_the_next_prefill():
    store, sender_model, receiver_model = memory(), tiny_model("llama", 0), tiny_model("llama", 1)
    prompt = tokens(40, 3)
    fill(door(sender_model, store), prompt)
    sender, receiver = door(sender_model, store), door(receiver_model, store, save=False)
    policies = PolicySet([policy(sender, receiver, "1-2")])
    receiver.connector.policies = sender.connector.policies = policies
    assert receiver.prefill(prompt).outcome.reason is Reason.E_MISSING
    assert sender.prefill(prompt).outcome.reason is Reason.E_MISSING
    sender.flush()
    assert receiver.prefill(prompt).outcome.reason is Reason.CROSS_MODEL_HIT
    assert sender.prefill(prompt).outcome.reason is Reason.EXACT_HIT
    assert door(sender_model, store, save=False).prefill(prompt).outcome.reason is Reason.EXACT_HIT


def test_a_prompt_that_ends_with_a_chunk_is_saved_whole():
    store, model = memory(), tiny_model("llama", 0)
    droid, document = door(model, store), tokens(3 * SIZE, 5)
    first = droid.prefill(document)
    droid.flush()
    assert first.tokens == 3 * SIZE - 1
    assert torch.equal(
        logits_after(model, first, document), logits_after(model, droid.prefill(document), document)
    )
    assert droid.prefill(torch.cat([document, tokens(5, 6)])).outcome.exact_tokens == 3 * SIZE
