"""The harness: what it says of a method is what serving that method would say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from droidspeak.errors import PromptError, UsageError
from droidspeak.integrations.transformers import Decoder, capture, partial_prefill, past_key_values
from droidspeak.integrations.transformers.answer import PromptEncoder
from droidspeak.integrations.transformers.cacheblend import blend
from droidspeak.integrations.transformers.evaluate import Bench, BenchSpec, encode_units
from droidspeak.integrations.transformers.mixing import Mixer
from droidspeak.integrations.transformers.rows import (
    Row,
    agreement,
    divergence,
    greedy,
    teacher_forced,
)
from droidspeak.layerselect import CacheBlend, Plan, ReuseOne
from droidspeak.layerselect.profiler import contiguous_groups
from droidspeak.layerselect.tasks import SENDER_ALONE, Question, Task, Unit
from droidspeak.prompts import Prompt, load_prompts

from .tiny_models import ARCHITECTURES, WINDOWED, tiny_model, tokens

LAB = Path(__file__).parents[2] / "lab"
FULL_ATTENTION = [name for name in ARCHITECTURES if name not in WINDOWED]


def lab_bench(sender: str = "coder", receiver: str = "base", metric: str = "exact-match") -> Bench:
    return Bench(BenchSpec(LAB / "models" / sender, LAB / "models" / receiver, metric, 8, 1))


def lab_units(receiver: str = "base", count: int = 1) -> list[Unit]:
    prompts = load_prompts(LAB / "prompts" / f"{receiver}.jsonl")
    return encode_units(prompts, PromptEncoder(LAB / "models" / receiver, 401), max_tokens=2000)[:count]


def same(first, second, tolerance: float = 0.0) -> bool:
    return all(
        torch.allclose(a.float(), b.float(), atol=tolerance)
        for pair in zip(first, second, strict=True)
        for a, b in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_run_per_start_gives_what_a_run_per_group_gives(architecture):
    sender, receiver = (Decoder(tiny_model(architecture, seed)) for seed in (1, 2))
    ids, layers = tokens(30), sender.num_layers
    plans = [Plan.recompute(layers, [group]) for group in contiguous_groups(layers, 1)]
    plans += [Plan.parse("reuse", layers), Plan.parse("1-1,3-3", layers)]
    mixer = Mixer(sender, receiver, ids, plans)
    sent = capture(sender, ids, range(layers))
    seen = []
    for batch in mixer.mixed():
        for plan, mixed in batch:
            assert same(mixed, partial_prefill(plan, receiver, ids, sent), 1e-5), plan
            seen.append(plan)
    assert sorted(map(str, seen)) == sorted(map(str, plans))
    # One run per start, and those of the scattered plan.
    assert len(mixer.runs) == layers + 2


def test_reuse_one_is_the_receivers_own_cache_but_for_one_layer():
    sender, receiver = (Decoder(tiny_model("llama", seed)) for seed in (1, 2))
    mixer = Mixer(sender, receiver, tokens(20), [ReuseOne(2)])
    ((_, mixed),) = next(mixer.mixed())
    assert [same([kv], [own]) for kv, own in zip(mixed, mixer.own.layers, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    assert same([mixed[2]], [mixer.sent.layers[2]])


@pytest.mark.parametrize("architecture", FULL_ATTENTION)
def test_cacheblend_of_all_tokens_is_full_prefill(architecture):
    sender, receiver = (Decoder(tiny_model(architecture, seed)) for seed in (1, 2))
    ids = tokens(30)
    own = capture(receiver, ids, [1])
    assert same(blend(receiver, ids, capture(sender, ids), own, 1.0), own.layers, 1e-5)


def test_cacheblend_recomputes_the_tokens_that_differ_most_and_no_others():
    sender, receiver = (Decoder(tiny_model("llama", seed)) for seed in (1, 2))
    ids = tokens(30)
    sent, own = capture(sender, ids), capture(receiver, ids, [1])
    mixed = blend(receiver, ids, sent, own, 0.2)
    differ = (own.layers[1][0] - sent.layers[1][0]).square().sum((1, 2)).topk(6).indices.sort().values
    for layer in range(1, 4):
        changed = (mixed[layer][0] != sent.layers[layer][0]).flatten(1).any(1).nonzero().flatten()
        assert torch.equal(changed, differ)
    assert same([mixed[0]], [own.layers[0]])
    assert torch.allclose(mixed[1][0][differ], own.layers[1][0][differ], atol=1e-5)


def test_cacheblend_of_no_tokens_is_full_reuse_but_for_the_first_layer():
    sender, receiver = (Decoder(tiny_model("llama", seed)) for seed in (1, 2))
    ids = tokens(30)
    sent, own = capture(sender, ids), capture(receiver, ids, [1])
    assert same(blend(receiver, ids, sent, own, 0.0), [own.layers[0], *sent.layers[1:]])


@pytest.mark.parametrize("architecture", WINDOWED)
def test_cacheblend_is_refused_where_attention_has_a_window(architecture):
    sender, receiver = (Decoder(tiny_model(architecture, seed)) for seed in (1, 2))
    ids = tokens(30)
    with pytest.raises(UsageError, match="window"):
        blend(receiver, ids, capture(sender, ids), capture(receiver, ids, [1]), 0.5)


def alone(model: PreTrainedModel, layers, suffix, answer) -> torch.Tensor:
    """The logits of one answer's tokens, one request at a time."""
    ids = torch.tensor([[*suffix, *answer[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=past_key_values(model.config, layers)).logits
    return logits[0, len(suffix) - 1 :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_many_lengths_are_answered_as_if_alone(architecture):
    model = tiny_model(architecture, 3)
    decoder = Decoder(model)
    layers = [capture(decoder, tokens(24, seed)).layers for seed in (1, 2)]
    suffixes = [(5, 6, 7), (8,), (9, 10, 11, 12), (13, 14, 15), (3,)]
    answers = [(4, 5), (6, 7, 8), (9,), (10, 11), (2, 3, 4, 5)]
    rows = [Row(layers[n % 2], suffix) for n, suffix in enumerate(suffixes)]
    forced = teacher_forced(decoder, rows, answers)
    said = greedy(decoder, rows, max_new_tokens=3, eos_ids=())
    for row, answer, logits, words in zip(rows, answers, forced, said, strict=True):
        assert torch.allclose(logits, alone(model, row.layers, row.suffix, answer), atol=1e-4)
        own = alone(model, row.layers, row.suffix, words)
        assert tuple(own.argmax(-1).tolist()) == words


def test_greedy_stops_where_each_row_says_so():
    model = tiny_model("llama", 3)
    decoder = Decoder(model)
    layers = capture(decoder, tokens(24)).layers
    rows = [Row(layers, (5, 6)), Row(layers, (7, 8))]
    free = greedy(decoder, rows, max_new_tokens=4, eos_ids=())
    assert len(set(free)) == 2
    stopped = greedy(decoder, rows, max_new_tokens=4, eos_ids={free[0][1]})
    assert stopped[0] == free[0][:2]
    assert greedy(decoder, [], max_new_tokens=4, eos_ids=()) == []


def test_scores_on_the_lab_are_those_that_it_is_known_for():
    (unit,) = lab_units()
    result = lab_bench().run(Task(unit, ("full", "reuse", "0-2", "reuse-one:2"), sender_alone=True))
    quality = {name: [score.quality for score in rows.values()] for name, rows in result.scores.items()}
    assert quality["full"] == quality["0-2"] == [1.0] * 8
    assert sum(quality["reuse"]) <= 2
    assert sum(quality["reuse-one:2"]) <= 4
    assert sum(quality[SENDER_ALONE]) == 0
    assert all(score.agreement == 1 and score.kl < 1e-3 for score in result.scores["full"].values())
    assert all(list(rows) == [question.id for question in unit.questions] for rows in result.scores.values())


def test_without_generation_quality_says_how_close_the_logits_are():
    (unit,) = lab_units()
    bench = lab_bench()
    rows = bench.run(Task(unit, ("reuse",), generate=False)).scores["reuse"]
    told = bench.run(Task(unit, ("reuse",))).scores["reuse"]
    assert all(0 < score.quality < 1 for score in rows.values())
    assert [score.kl for score in rows.values()] == pytest.approx([score.kl for score in told.values()])


def test_logits_that_are_not_finite_are_an_error_that_names_prompt_and_method():
    bench = lab_bench()
    (unit,) = lab_units()
    with torch.no_grad():
        bench.sender.model.model.layers[4].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match=r"prompt base-00-0, reuse: logits are not finite"):
        bench.run(Task(unit, ("reuse",)))


def test_plans_that_need_maps_need_maps():
    with pytest.raises(UsageError, match="maps"):
        lab_bench().run(Task(lab_units()[0], ("1-2+emap",)))


def test_units_share_prefixes_and_keep_order():
    encoder = PromptEncoder(LAB / "models" / "base", 401)
    prompts = [Prompt(str(n), (1, 2, n % 2), (4,), (5,)) for n in range(4)]
    units = encode_units(prompts, encoder, max_tokens=10)
    assert [[question.id for question in unit.questions] for unit in units] == [["0", "2"], ["1", "3"]]
    assert units[0] == Unit((1, 2, 0), (Question("0", (4,), (5,)), Question("2", (4,), (5,))))


def test_a_question_without_tokens_is_refused():
    encoder = PromptEncoder(LAB / "models" / "base", 401)
    with pytest.raises(PromptError, match="prompt x: prefix and question must each make at least one token"):
        encode_units([Prompt("x", "<s> Q:", " ", "Paris")], encoder, max_tokens=11)


def test_a_prompt_longer_than_the_context_is_refused():
    encoder = PromptEncoder(LAB / "models" / "base", 401)
    with pytest.raises(PromptError, match=r"prompt x has 12 tokens; .* room for 11"):
        encode_units([Prompt("x", (1,) * 10, (2, 2), (3,))], encoder, max_tokens=11)


def test_cacheblend_takes_its_place_among_the_methods():
    (unit,) = lab_units()
    result = lab_bench().run(Task(unit, (str(CacheBlend(1.0)), str(CacheBlend(0.1)))))
    assert [score.quality for score in result.scores["cacheblend:1"].values()] == [1.0] * 8
    assert sum(score.quality for score in result.scores["cacheblend:0.1"].values()) <= 4


def test_measures_by_hand():
    half = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    other = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    assert divergence(half, half) == 0
    assert divergence(half, other) == pytest.approx(0.5 * (0.25 * math.log(1 / 3) + 0.75 * math.log(3)))
    assert agreement(half, other) == 0.5
    assert math.isnan(divergence(half, other * math.nan))
