"""The model side of the transformers door: what it computes equals what the model itself computes."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV, past_key_values, plan_batch, stack

from .tiny_models import ARCHITECTURES, HIDDEN, WINDOW, WINDOWED, tiny_config, tiny_model, tokens

PREFIX, SUFFIX = tokens(21, seed=1), tokens(6, seed=2)

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@dataclass
class Capture:
    """What `on_layer` was told of a prefill: K and V, and E, per layer."""

    layers: list[KV]
    e: list[Tensor]
    cache: DynamicCache


def capture(decoder: Decoder, token_ids: Tensor, past: list[KV] | tuple[()] = ()) -> Capture:
    layers: list[KV] = []
    inputs: list[Tensor] = []

    def keep(layer: int, k: Tensor, v: Tensor, e: Tensor | None) -> None:
        assert layer == len(layers)
        assert e is not None
        layers.append((k, v))
        inputs.append(e)

    cache = decoder.prefill(token_ids, past=past, e_layers=range(decoder.num_layers), on_layer=keep)
    return Capture(layers, inputs, cache)


def groups(num_layers: int) -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(num_layers), 2))


@torch.no_grad()
def suffix_logits(model, cache: DynamicCache) -> Tensor:
    return model(SUFFIX[None], past_key_values=cache).logits


@torch.no_grad()
def own_prefill(model, token_ids: Tensor = PREFIX, **kwargs):
    return model(token_ids[None], use_cache=True, **kwargs)


def mixed(decoder: Decoder, sender: Capture, start: int, end: int) -> list[KV]:
    """The sender's K and V with the receiver's in the group."""
    group = decoder.recompute(PREFIX, start, end, e=sender.e[start] if start else None)
    return [*sender.layers[:start], *group, *sender.layers[end + 1 :]]


def assert_close(actual: list[KV], expected: list[KV]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# Prefill


@every_architecture
def test_prefill_captures_what_the_model_computes(architecture):
    model = tiny_model(architecture)
    own = own_prefill(model, output_hidden_states=True)
    captured = capture(Decoder(model), PREFIX)

    assert type(captured.cache) is DynamicCache
    for layer, slot in enumerate(own.past_key_values.layers):
        assert torch.equal(captured.e[layer], own.hidden_states[layer][0])
        assert torch.equal(captured.cache.layers[layer].keys, slot.keys)
        assert torch.equal(captured.cache.layers[layer].values, slot.values)
        held = slot.keys.shape[-2]
        assert held == (WINDOW - 1 if slot.is_sliding else len(PREFIX))
        for state, kept in zip(captured.layers[layer], (slot.keys, slot.values), strict=True):
            assert state.shape[0] == len(PREFIX)
            assert torch.equal(state[-held:], kept[0].transpose(0, 1))


@pytest.mark.parametrize("architecture", WINDOWED)
def test_windowed_models_have_windows(architecture):
    assert any(Decoder(tiny_model(architecture)).prefill(PREFIX).is_sliding)


@every_architecture
def test_states_outside_the_window_are_captured_too(architecture):
    decoder = Decoder(tiny_model(architecture))
    whole = capture(decoder, PREFIX)
    start = capture(decoder, PREFIX[:5])
    assert_close([(k[:5], v[:5]) for k, v in whole.layers], start.layers)


@every_architecture
@pytest.mark.parametrize("split", [3, 13])
def test_prefill_in_two_pieces(architecture, split):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    whole = capture(decoder, PREFIX)
    first = capture(decoder, PREFIX[:split])
    second = capture(decoder, PREFIX[split:], past=first.layers)

    assert_close(second.layers, [(k[split:], v[split:]) for k, v in whole.layers])
    torch.testing.assert_close(second.e, [e[split:] for e in whole.e], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        suffix_logits(model, second.cache), suffix_logits(model, whole.cache), atol=1e-5, rtol=1e-5
    )


def test_e_only_of_the_layers_asked_for():
    seen = {}
    Decoder(tiny_model("llama")).prefill(
        PREFIX, e_layers={0, 2}, on_layer=lambda i, k, v, e: seen.update({i: e})
    )
    assert [layer for layer, e in seen.items() if e is not None] == [0, 2]


def test_layers_arrive_as_they_are_ready():
    seen = []

    def refuse(layer, k, v, e):
        seen.append(layer)
        if layer == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Decoder(tiny_model("llama")).prefill(PREFIX, on_layer=refuse)
    assert seen == [0, 1]


def test_captured_states_are_views_of_the_cache():
    captured = capture(Decoder(tiny_model("phi3")), PREFIX)
    for (k, v), slot in zip(captured.layers, captured.cache.layers, strict=True):
        assert k.data_ptr() == slot.keys.data_ptr()
        assert v.data_ptr() == slot.values.data_ptr()


# Recompute


@every_architecture
def test_every_group_is_exact_when_the_sender_is_the_receiver(architecture):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    sender = capture(decoder, PREFIX)
    expected = suffix_logits(model, own_prefill(model).past_key_values)
    for start, end in groups(decoder.num_layers):
        cache = past_key_values(decoder.config, mixed(decoder, sender, start, end))
        assert torch.equal(suffix_logits(model, cache), expected), (start, end)


@every_architecture
def test_every_group_equals_a_forward_whose_transition_layer_is_given_e(architecture):
    """The reference enters E by a hook on a copy of the receiver: another way to the same numbers."""
    receiver = tiny_model(architecture, seed=1)
    sender = capture(Decoder(tiny_model(architecture, seed=2)), PREFIX)
    decoder = Decoder(receiver)
    for start, end in groups(decoder.num_layers):
        reference = copy.deepcopy(receiver)
        if start:
            reference.model.layers[start].register_forward_pre_hook(
                lambda _, args, e=sender.e[start]: (e[None], *args[1:])
            )
        own = own_prefill(reference).past_key_values.layers
        group = decoder.recompute(PREFIX, start, end, e=sender.e[start] if start else None)
        for (k, v), slot in zip(group, own[start : end + 1], strict=True):
            held = slot.keys.shape[-2]
            assert torch.equal(k[-held:], slot.keys[0].transpose(0, 1))
            assert torch.equal(v[-held:], slot.values[0].transpose(0, 1))


@every_architecture
def test_another_sender_changes_the_logits(architecture):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    other = capture(Decoder(tiny_model(architecture, seed=7)), PREFIX)
    expected = suffix_logits(model, own_prefill(model).past_key_values)
    reused = suffix_logits(model, past_key_values(decoder.config, other.layers))
    patched = suffix_logits(model, past_key_values(decoder.config, mixed(decoder, other, 1, 2)))
    everything = suffix_logits(
        model, past_key_values(decoder.config, mixed(decoder, other, 0, len(other.e) - 1))
    )

    assert (reused - expected).abs().max() > 0.1
    assert (patched - expected).abs().max() > 0.1
    assert (patched - reused).abs().max() > 0.01
    assert torch.equal(everything, expected)


@every_architecture
@pytest.mark.parametrize("exact", [3, 13])
def test_recompute_after_exact_tokens(architecture, exact):
    decoder = Decoder(tiny_model(architecture))
    whole = capture(decoder, PREFIX)
    for start, end in groups(decoder.num_layers):
        past = [
            (k[:exact], v[:exact]) if start <= layer <= end else ()
            for layer, (k, v) in enumerate(whole.layers)
        ]
        e = whole.e[start][exact:] if start else None
        group = decoder.recompute(PREFIX[exact:], start, end, e=e, past=past)
        assert_close(group, [(k[exact:], v[exact:]) for k, v in whole.layers[start : end + 1]])


def test_recompute_runs_nothing_outside_the_group():
    model = tiny_model("llama")
    e = capture(Decoder(model), PREFIX).e[1]
    ran = []
    for layer, module in enumerate(model.model.layers):
        module.self_attn.k_proj.register_forward_hook(lambda *_, layer=layer: ran.append(("k", layer)))
        module.mlp.register_forward_hook(lambda *_, layer=layer: ran.append(("mlp", layer)))
    model.model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    arrived = []

    Decoder(model).recompute(PREFIX, 1, 2, e=e, on_layer=lambda i, k, v, e: arrived.append((i, e)))
    assert ran == [("k", 1), ("mlp", 1), ("k", 2)]
    assert arrived == [(1, None), (2, None)]


def test_e_of_another_type_is_cast():
    decoder = Decoder(tiny_model("llama"))
    e = capture(decoder, PREFIX).e[1].bfloat16()
    k, _ = decoder.recompute(PREFIX, 1, 1, e=e)[0]
    assert k.dtype == decoder.dtype == torch.float32


# Generation


@torch.no_grad()
def greedy(model, input_ids: Tensor, **kwargs) -> Tensor:
    """The 12 greedy tokens `[batch, 12]` after `input_ids` `[batch, columns]`."""
    kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
    out = model.generate(input_ids, max_new_tokens=12, do_sample=False, **kwargs)
    return out[:, input_ids.shape[1] :]


@every_architecture
def test_generate_over_a_cache_equals_plain_generate(architecture):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    prompt = torch.cat([PREFIX, SUFFIX])[None]
    expected = greedy(model, prompt)
    captured = capture(decoder, PREFIX)
    assert torch.equal(greedy(model, prompt, past_key_values=captured.cache), expected)
    cache = past_key_values(decoder.config, captured.layers)
    assert torch.equal(greedy(model, prompt, past_key_values=cache), expected)


BATCHES = {
    "aligned": ([27, 27], [21, 21]),
    "long and short": ([40, 12, 25, 5], [32, 8, 16, 0]),
    "one row without cache": ([31, 9, 30], [24, 0, 29]),
    "a row cached whole": ([24, 24], [24, 16]),
    "nothing cached": ([14, 6], [0, 0]),
    "inside the window": ([9, 7], [5, 4]),
}


@every_architecture
@pytest.mark.parametrize(("lengths", "cached"), BATCHES.values(), ids=BATCHES)
def test_a_stacked_batch_generates_what_each_row_does_alone(architecture, lengths, cached):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    prompts = [tokens(length, seed=seed) for seed, length in enumerate(lengths)]
    rows = [
        capture(decoder, prompt[:n]).layers if n else [] for prompt, n in zip(prompts, cached, strict=True)
    ]
    width = max(lengths)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1

    cache = stack(decoder.config, rows, plan_batch(lengths, cached))
    generated = greedy(model, input_ids, attention_mask=attention_mask, past_key_values=cache)
    for row, prompt in enumerate(prompts):
        assert torch.equal(generated[row], greedy(model, prompt[None])[0]), row


def test_plan_of_a_batch():
    assert plan_batch([40, 12, 25, 5], [32, 8, 16, 0]) == (31, (31, 3, 16, 0))
    assert plan_batch([24], [24]) == (23, (23,))
    assert plan_batch([3, 9], [0, 0]) == (0, (0, 0))


def test_every_small_plan_is_consistent_and_keeps_all_it_can():
    rows = [(length, have) for length in range(1, 5) for have in range(length + 1)]
    for batch in itertools.product(rows, repeat=3):
        lengths, cached = zip(*batch, strict=True)
        columns, kept = plan_batch(lengths, cached)
        width = max(lengths)

        def kept_with(columns, width=width, lengths=lengths):
            return tuple(max(0, columns - (width - length)) for length in lengths)

        def allowed(kept, lengths=lengths, cached=cached):
            return all(
                n <= min(have, length - 1) for n, have, length in zip(kept, cached, lengths, strict=True)
            )

        assert kept == kept_with(columns)
        assert allowed(kept)
        assert not allowed(kept_with(columns + 1))


def test_plan_refuses_what_cannot_be():
    with pytest.raises(UsageError, match="needs rows"):
        plan_batch([], [])
    with pytest.raises(UsageError, match="more cached tokens"):
        plan_batch([4], [5])


def test_stack_pads_on_the_left_and_keeps_windows():
    config = tiny_config("gemma3")
    rows = [
        [(torch.full((n, 2, 16), 1.0 + row),) * 2 for _ in range(config.num_hidden_layers)]
        for row, n in enumerate((12, 10))
    ]
    cache = stack(config, rows, plan_batch([14, 8], [12, 7]))
    for slot in cache.layers:
        held = WINDOW - 1 if slot.is_sliding else 12
        assert slot.keys.shape == slot.values.shape == (2, 2, held, 16)
        assert slot.get_seq_length() == 12
        assert (slot.keys[0] == 1).all()
        assert (slot.keys[1, :, :-6] == 0).all()
        assert (slot.keys[1, :, -6:] == 2).all()


# Caches


@every_architecture
def test_a_cache_over_given_states_copies_nothing_and_writes_nothing(architecture):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    layers = capture(decoder, PREFIX).layers
    before = [(k.clone(), v.clone()) for k, v in layers]
    cache = past_key_values(decoder.config, layers)
    for (k, _), slot in zip(layers, cache.layers, strict=True):
        assert slot.keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert slot.get_seq_length() == len(PREFIX)
    suffix_logits(model, cache)
    cache.reset()
    for pair, was in zip(layers, before, strict=True):
        assert torch.equal(pair[0], was[0])
        assert torch.equal(pair[1], was[1])


def test_caches_refuse_states_that_do_not_fit():
    config = tiny_config("llama")
    pair = (torch.zeros(5, 2, 8),) * 2
    short = (torch.zeros(4, 2, 8),) * 2
    with pytest.raises(UsageError, match="3 layers were given, the model has 4"):
        past_key_values(config, [pair] * 3)
    with pytest.raises(UsageError, match=r"lengths \[4, 5\]"):
        past_key_values(config, [pair] * 3 + [short])
    with pytest.raises(UsageError, match="4 tokens were given, the plan keeps 5"):
        stack(config, [[short] * 4], plan_batch([6], [5]))


# PEFT


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_peft_models_prefill_with_their_adapter(architecture):
    base = tiny_model(architecture)
    plain = capture(Decoder(base), PREFIX)
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), lora).eval()
    decoder = Decoder(model)
    captured = capture(decoder, PREFIX)

    own = own_prefill(model)
    for layer, slot in enumerate(own.past_key_values.layers):
        assert torch.equal(captured.cache.layers[layer].keys, slot.keys)
        assert torch.equal(captured.cache.layers[layer].values, slot.values)
        assert not torch.allclose(captured.layers[layer][1], plain.layers[layer][1], atol=1e-2)
    expected = suffix_logits(model, own.past_key_values)
    for start, end in groups(decoder.num_layers):
        cache = past_key_values(decoder.config, mixed(decoder, captured, start, end))
        assert torch.equal(suffix_logits(model, cache), expected)


# The user's model


def fingerprint(model) -> list[object]:
    """Everything about a module tree that a hook, a swap or a stray attribute would change."""
    return [
        (name, id(module), type(module), *((key, repr(value)) for key, value in sorted(vars(module).items())))
        for name, module in model.named_modules()
    ]


@every_architecture
def test_the_model_is_left_as_it_was(architecture):
    model = tiny_model(architecture)
    model.config.output_hidden_states = True
    decoder = Decoder(model)
    before = fingerprint(model)
    sender = capture(decoder, PREFIX)
    mixed(decoder, sender, 1, 2)
    with pytest.raises(ZeroDivisionError):
        decoder.prefill(PREFIX, on_layer=lambda *_: 1 / 0)
    assert fingerprint(model) == before
    assert len(own_prefill(model).hidden_states) == decoder.num_layers + 1


def test_a_forward_set_on_the_instance_is_not_in_the_way():
    """accelerate sets one; it is bound to the user's module, not to a view of it."""
    model = tiny_model("llama")
    expected = capture(Decoder(model), PREFIX)
    model.model.forward = partial(type(model.model).forward, model.model)
    decoder = Decoder(model)
    group = decoder.recompute(PREFIX, 1, 2, e=expected.e[1])
    assert_close(group, expected.layers[1:3])
    assert torch.equal(decoder.prefill(PREFIX).layers[-1].keys, expected.cache.layers[-1].keys)


def test_threads_share_a_decoder():
    model = tiny_model("gemma3")
    decoder = Decoder(model)
    sender = capture(decoder, PREFIX)
    expected = suffix_logits(model, own_prefill(model).past_key_values)

    def work(group: tuple[int, int]) -> bool:
        cache = past_key_values(decoder.config, mixed(decoder, sender, *group))
        own = suffix_logits(model, decoder.prefill(PREFIX))
        return torch.equal(suffix_logits(model, cache), expected) and torch.equal(own, expected)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, groups(decoder.num_layers) * 4))


# Refusals


def test_models_of_another_shape_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8))
    bart = BartForConditionalGeneration(
        BartConfig(
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
        )
    )
    for model in (gpt2, bart, tiny_model("llama").model):
        with pytest.raises(UsageError, match=rf"^{type(model).__name__} has no `model\.layers`"):
            Decoder(model)


def test_layers_that_keep_more_than_kv_are_refused():
    model = tiny_model("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(UsageError, match="layer 0 keeps its state in a LinearAttentionLayer"):
        Decoder(model)


def test_layers_that_share_kv_are_refused():
    model = tiny_model("qwen3")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(UsageError, match="shares K and V between layers"):
        Decoder(model)


def test_learned_prompts_are_refused():
    model = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UsageError, match="learns a prompt"):
        Decoder(model)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"call model\.eval\(\)"):
        Decoder(tiny_model("llama").train()).prefill(PREFIX)


@pytest.mark.parametrize(
    ("start", "end", "e", "message"),
    [
        (0, 4, None, r"group \[0, 4\] is not within layers 0\.\.3"),
        (2, 1, torch.zeros(21, HIDDEN), r"group \[2, 1\]"),
        (1, 2, None, "needs the E of its first layer"),
        (0, 2, torch.zeros(21, HIDDEN), "takes no E"),
        (1, 2, torch.zeros(20, HIDDEN), r"E must be \[tokens, hidden\] = \[21, 32\]"),
    ],
)
def test_groups_that_do_not_fit_are_refused(start, end, e, message):
    with pytest.raises(UsageError, match=message):
        Decoder(tiny_model("llama")).recompute(PREFIX, start, end, e=e)


def test_inputs_that_do_not_fit_are_refused():
    decoder = Decoder(tiny_model("llama"))
    for token_ids in (PREFIX[None], PREFIX[:0]):
        with pytest.raises(UsageError, match="token_ids must be"):
            decoder.prefill(token_ids)
    with pytest.raises(UsageError, match="past has 3 layers, the model has 4"):
        decoder.prefill(SUFFIX, past=capture(decoder, PREFIX).layers[:3])
