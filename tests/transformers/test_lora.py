"""Identity of a loaded model: adapters are sources of their own, and no change goes unnoticed."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from droidspeak.connector import Reason
from droidspeak.errors import UnknownIdentity
from droidspeak.integrations.transformers import manifest_of
from droidspeak.integrations.transformers.identity import ModelIdentity
from droidspeak.layerselect import PolicySet
from droidspeak.storage import SourceManifest

from .sharing import SIZE, ask, door, fill, greedy, memory, policy, pretended_folder, sources_in
from .tiny_models import ARCHITECTURES, tiny_model, tokens

IDS = tokens(3 * SIZE + 5, seed=1)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(seed: int = 3, **settings) -> LoraConfig:
    """A configuration; the seed decides the weights of the next adapter."""
    torch.manual_seed(seed)
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **settings})


def adapted(seed: int = 3, base=None, **settings) -> PeftModel:
    base = tiny_model("llama") if base is None else base
    return get_peft_model(base, lora(seed, **settings)).eval()


def two_adapters() -> PeftModel:
    model = adapted()
    model.add_adapter("second", lora(4))
    return model.eval()


def source(model, folder=None) -> str:
    return manifest_of(model, folder).source_id


def folder_of(model, place, name="model"):
    model.save_pretrained(place / name)
    return place / name


# Who is who


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_and_the_model_loaded_from_it_are_one_source(architecture, tmp_path):
    model = tiny_model(architecture)
    folder = folder_of(model, tmp_path)
    assert manifest_of(model, folder) == SourceManifest.from_folder(folder, dtype="float32")


def test_the_same_weights_are_the_same_source():
    assert source(tiny_model("llama")) == source(tiny_model("llama"))
    assert source(tiny_model("llama")) != source(tiny_model("llama", seed=1))
    assert source(tiny_model("llama")) != source(tiny_model("llama").bfloat16())


def test_memory_and_folder_are_different_sources(tmp_path):
    model = tiny_model("llama")
    assert source(model) != source(model, folder_of(model, tmp_path))


VARIANTS = {
    "base": lambda: tiny_model("llama"),
    "adapter": adapted,
    "other weights": lambda: adapted(4),
    "other rank": lambda: adapted(r=2),
    "other scale": lambda: adapted(lora_alpha=32),
    "rslora": lambda: adapted(use_rslora=True),
    "dora": lambda: adapted(use_dora=True),
    "fewer targets": lambda: adapted(target_modules=TARGETS[:2]),
    "other base": lambda: adapted(base=tiny_model("llama", seed=1)),
    "embeddings": lambda: adapted(target_modules=["embed_tokens"]),
    "other embeddings": lambda: adapted(4, target_modules=["embed_tokens"]),
    "saved module": lambda: adapted(modules_to_save=["embed_tokens"]),
    "ia3": lambda: with_ia3(1.5),
    "other ia3": lambda: with_ia3(2.0),
}


def with_ia3(value: float) -> PeftModel:
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(tiny_model("llama"), config).eval()
    for name, tensor in model.named_parameters():
        if "ia3_" in name:
            tensor.data.fill_(value)
    return model


@pytest.mark.parametrize("in_folder", [False, True])
def test_every_variant_is_its_own_source(in_folder, tmp_path):
    folder = pretended_folder(tmp_path, "base") if in_folder else None
    sources = {name: source(make(), folder) for name, make in VARIANTS.items()}
    if in_folder:
        # The folder is vouched for: it stands for whatever base was loaded.
        del sources["other base"]
    assert len(set(sources.values())) == len(sources)


def test_an_adapter_is_the_same_source_wherever_it_is_loaded(tmp_path):
    """Trained here, loaded there, under another name: the same bytes."""
    trained = adapted()
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    renamed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, adapter_name="other").eval()
    native = tiny_model("llama")
    native.load_adapter(str(tmp_path))
    assert len({source(model) for model in (trained, loaded, renamed, native.eval())}) == 1


def test_adapters_that_are_only_loaded_do_not_matter():
    assert source(two_adapters()) == source(adapted())


@pytest.mark.parametrize("native", [False, True])
def test_a_model_without_its_adapter_is_its_base(native):
    base = source(tiny_model("llama"))
    if native:
        model = tiny_model("llama")
        model.add_adapter(lora())
        assert source(model) != base
        model.disable_adapters()
    else:
        model = adapted()
        model.base_model.disable_adapter_layers()
    assert source(model) == base


# Changes are noticed at once


class Followed:
    """The identity of one model over time."""

    def __init__(self, model, folder=None) -> None:
        self._identity = ModelIdentity(model, folder)
        self.seen = [self.now]

    @property
    def now(self) -> str | None:
        manifest = self._identity.manifest()
        return None if manifest is None else manifest.source_id

    def is_new(self) -> bool:
        self.seen.append(self.now)
        return self.seen[-1] not in self.seen[:-1] and self.seen[-1] == self.now


def in_folder(given: bool, tmp_path):
    return pretended_folder(tmp_path, "base") if given else None


@pytest.mark.parametrize("given", [False, True])
def test_switching_adapters(given, tmp_path):
    model = two_adapters()
    followed = Followed(model, in_folder(given, tmp_path))
    first = followed.now
    model.set_adapter("second")
    assert followed.is_new()
    model.base_model.set_adapter(["default", "second"])
    assert followed.is_new()
    with model.disable_adapter():
        assert followed.is_new()
    model.set_adapter("default")
    assert followed.now == first


@pytest.mark.parametrize("given", [False, True])
def test_loading_another_adapter_later(given, tmp_path):
    model = adapted()
    followed = Followed(model, in_folder(given, tmp_path))
    first = followed.now
    model.add_adapter("second", lora(4))
    model.eval()
    assert followed.now == first
    model.set_adapter("second")
    assert followed.is_new()
    assert followed.now is not None


@pytest.mark.parametrize("given", [False, True])
def test_scaling_an_adapter(given, tmp_path):
    model = adapted()
    followed = Followed(model, in_folder(given, tmp_path))
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    assert followed.is_new()


@pytest.mark.parametrize("given", [False, True])
def test_merging(given, tmp_path):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    followed = Followed(model, in_folder(given, tmp_path))
    first = followed.now
    model.merge_adapter()
    assert followed.is_new()
    assert followed.now is not None
    model.unmerge_adapter()
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert not same, "this test wants weights that rounding has changed"
    assert followed.now != first
    assert (followed.now is None) == given


def test_merging_away(tmp_path):
    model = adapted()
    followed = Followed(model, in_folder(True, tmp_path))
    model.merge_and_unload()
    assert followed.is_new()


def test_a_merged_adapter_that_is_switched_off_has_no_identity(caplog):
    """PEFT unmerges in the next forward: whatever is said now would be wrong then."""
    model = adapted()
    followed = Followed(model)
    model.merge_adapter()
    with model.disable_adapter(), caplog.at_level(logging.WARNING):
        assert followed.now is None
    assert "switched off" in caplog.text


def optimizer_step(parameters, **options) -> None:
    parameters = list(parameters)
    for tensor in parameters:
        tensor.requires_grad_(True)
        tensor.grad = torch.ones_like(tensor)
    torch.optim.AdamW(parameters, lr=1e-3, **options).step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_training_the_base(given, options, tmp_path):
    model = tiny_model("llama")
    followed = Followed(model, in_folder(given, tmp_path))
    for _ in range(2):
        optimizer_step(model.parameters(), **options)
        assert followed.is_new() or (given and followed.now is None)
    assert (followed.now is None) == given


@pytest.mark.parametrize("given", [False, True])
def test_training_an_adapter_is_known_by_its_bytes(given, tmp_path):
    model = adapted()
    followed = Followed(model, in_folder(given, tmp_path))
    optimizer_step(tensor for name, tensor in model.named_parameters() if "lora_" in name)
    assert followed.is_new()
    assert followed.now is not None


CHANGES = {
    "one value": lambda model: model.model.layers[2].mlp.up_proj.weight[3, 4].fill_(9),
    "load_state_dict": lambda model: model.load_state_dict(tiny_model("llama", seed=5).state_dict()),
    "data": lambda model: model.model.norm.weight.data.mul_(1.001),
    "new data": lambda model: setattr(model.model.norm.weight, "data", torch.ones(32) * 2),
    "new parameter": lambda model: setattr(
        model.model.norm, "weight", torch.nn.Parameter(torch.ones(32) * 2)
    ),
    "dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("given", [False, True])
def test_changes_in_place(change, given, tmp_path):
    model = tiny_model("llama")
    followed = Followed(model, in_folder(given, tmp_path))
    with torch.no_grad():
        CHANGES[change](model)
    assert followed.is_new()
    assert (followed.now is None) == given


def test_changed_and_changed_back_is_known_again_in_memory():
    model = tiny_model("llama")
    followed = Followed(model)
    first = followed.now
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer_step(model.parameters())
    assert followed.is_new()
    model.load_state_dict(state)
    assert followed.now == first


def test_a_folder_that_is_overwritten_after_loading_changes_nothing(tmp_path):
    folder = pretended_folder(tmp_path, "base")
    before = manifest_of(adapted(), folder)
    droid = door(adapted(), memory(), folder=folder)
    (folder / "model.safetensors").write_text("a new revision")
    assert droid.manifest == before
    droid.model.base_model.disable_adapter_layers()
    assert droid.manifest.weights == before.weights


def test_using_a_model_changes_nothing():
    model = adapted()
    droid = door(model, memory())
    before = droid.manifest
    ask(droid, IDS)
    greedy(model, IDS[None])
    assert droid.manifest is before


# What cannot be identified


@pytest.mark.parametrize("damage", [lambda f: (f / "model.safetensors").unlink()])
def test_a_folder_without_weights(damage, tmp_path, caplog):
    folder = pretended_folder(tmp_path, "base")
    damage(folder)
    with pytest.raises(UnknownIdentity):
        manifest_of(tiny_model("llama"), folder)
    store = memory()
    with caplog.at_level(logging.WARNING):
        droid = door(tiny_model("llama"), store, folder=folder)
        answer, outcome = ask(droid, IDS)
    assert "no sharing and no saving" in caplog.text
    assert (droid.manifest, outcome.reason) == (None, Reason.UNKNOWN_WEIGHTS)
    assert torch.equal(answer, greedy(droid.model, IDS[None]))
    droid.flush()
    assert store.usage().chunks == 0


def test_weights_that_are_not_in_memory(tmp_path):
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(UnknownIdentity, match="not in memory"):
        manifest_of(model)
    assert manifest_of(model, pretended_folder(tmp_path, "base"))


def test_quantised_weights_are_not_their_folders(tmp_path):
    model = tiny_model("llama")
    folder = pretended_folder(tmp_path, "base")
    plain = source(model, folder)
    model.hf_quantizer = object()
    assert source(model, folder) != plain


def test_weights_loaded_in_inference_mode():
    with torch.inference_mode():
        model = tiny_model("llama")
        followed = Followed(model)
        assert followed.now == source(tiny_model("llama"))


def test_under_autocast_nothing_is_shared_or_saved():
    """The cache would be of the model's dtype all the same: transformers casts it back."""
    store = memory()
    droid = door(tiny_model("llama"), store)
    fill(droid, IDS[: SIZE + 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert droid.prefill(IDS).outcome.reason is Reason.UNKNOWN_WEIGHTS
    droid.flush()
    assert store.usage().chunks == 1
    assert droid.prefill(IDS).outcome.reason is Reason.EXACT_HIT


# Through the door


def test_adapters_never_take_each_others_cache():
    store = memory()
    model = two_adapters()
    droid = door(model, store)
    answers = {}
    for _ in range(2):
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            answers.setdefault(adapter, []).append(ask(droid, IDS))
            droid.flush()
    for adapter, [(first, _), (second, outcome)] in answers.items():
        model.set_adapter(adapter)
        assert outcome.reason is Reason.EXACT_HIT
        assert torch.equal(first, greedy(model, IDS[None]))
        assert torch.equal(first, second)
    assert len(sources_in(store)) == 2


@pytest.mark.parametrize("plan", ["reuse", "0-1", "1-2", "2-3"])
def test_base_to_lora(plan):
    base, tuned = tiny_model("llama"), adapted()
    store, policies = memory(), PolicySet()
    sender, receiver = door(base, store, policies), door(tuned, store, policies, save=False)
    policies.add(policy(sender, receiver, plan))
    fill(sender, IDS)
    assert ask(receiver, IDS)[1].reason is Reason.CROSS_MODEL_HIT
    with tuned.disable_adapter():
        answer, outcome = ask(receiver, IDS)
        assert outcome.reason is Reason.EXACT_HIT
        assert torch.equal(answer, greedy(base, IDS[None]))
    answer, _ = ask(receiver, IDS, share=False)
    assert torch.equal(answer, greedy(tuned, IDS[None]))


def test_one_peft_model_shares_between_its_adapters():
    """The base prefills, the adapter answers: the same module, another source."""
    model, store, policies = adapted(), memory(), PolicySet()
    droid = door(model, store, policies)
    receiver = droid.manifest
    with model.disable_adapter():
        sender = droid.manifest
        droid.prefill(IDS)
        droid.flush()
    assert sources_in(store) == {sender.source_id}
    policies.add(policy(door(tiny_model("llama"), store), droid, "0-1"))
    assert receiver == droid.manifest
    assert ask(droid, IDS)[1].source == sender.source_id


def test_a_training_step_leaves_the_old_cache_behind():
    model, store = tiny_model("llama"), memory()
    droid = door(model, store)
    fill(droid, IDS)
    optimizer_step(model.parameters())
    answer, outcome = ask(droid, IDS)
    assert outcome.reason is Reason.MISS
    assert torch.equal(answer, greedy(model, IDS[None]))


def test_a_twin_file_is_another_source(tmp_path):
    """Same tensors, another file: digests are of files, so this costs sharing, never rightness."""
    model = tiny_model("llama")
    one, two = folder_of(model, tmp_path, "one"), folder_of(model, tmp_path, "two")
    assert source(model, one) == source(model, two)
    weights = two / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "twin": "yes"})
    assert source(model, one) != source(copy.deepcopy(model), two)
