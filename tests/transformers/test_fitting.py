"""Maps fitted on real prefixes: what they say of a model, and what they are worth between two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers import Decoder, capture
from droidspeak.integrations.transformers.answer import PromptEncoder
from droidspeak.integrations.transformers.evaluate import Bench, BenchSpec, encode_units
from droidspeak.integrations.transformers.fitting import MIN_TOKENS, MapFitter, fit_maps
from droidspeak.integrations.transformers.mapped import mapped_source
from droidspeak.layerselect import Measures
from droidspeak.layerselect.mapping import MapFeatures
from droidspeak.layerselect.tasks import Task
from droidspeak.prompts import load_prompts

from .tiny_models import tiny_model, tokens

LAB = Path(__file__).parents[2] / "lab"
PREFIXES = [tokens(128, seed) for seed in range(9)]
OTHER = tokens(60, seed=100)
LINEAR, EMBEDDING = MapFeatures.LINEAR, MapFeatures.EMBEDDING


def lab_units(name: str):
    encoder = PromptEncoder(LAB / "models" / "base", 401)
    return encode_units(load_prompts(LAB / "prompts" / f"{name}.jsonl"), encoder, max_tokens=2000)


def lab_prefixes(count: int) -> list[torch.Tensor]:
    return [torch.tensor(unit.prefix) for unit in lab_units("base.calibration")[:count]]


def lab_decoder(name: str) -> Decoder:
    model = AutoModelForCausalLM.from_pretrained(LAB / "models" / name, dtype=torch.float32)
    return Decoder(model.eval())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3"])
def test_between_a_model_and_itself_maps_change_next_to_nothing(architecture):
    decoder = Decoder(tiny_model(architecture))
    own = capture(decoder, OTHER, range(1, decoder.num_layers))
    for kind, maps in fit_maps(decoder, decoder, PREFIXES, (LINEAR, EMBEDDING)).items():
        mapped = mapped_source(own, maps, decoder, OTHER)
        for layer in range(1, decoder.num_layers):
            assert torch.allclose(mapped.e(layer), own.e(layer), atol=1e-2), (kind, layer)
        for layer in range(decoder.num_layers):
            for got, want in zip(mapped.kv(layer), own.kv(layer), strict=True):
                assert torch.allclose(got, want, atol=1e-2), (kind, layer)


def test_layer_0_is_exact_where_the_receivers_embeddings_are_seen():
    """Its K and V are linear in them, so a map has nothing to guess."""
    sender, receiver = lab_decoder("coder"), lab_decoder("base")
    fitted = fit_maps(sender, receiver, lab_prefixes(4), e_layers=[], kv_layers=[0])
    ids = torch.tensor(lab_units("base")[0].prefix)
    sent, own = capture(sender, ids, end=0), capture(receiver, ids, end=0)
    worst = {
        kind: max(
            (got - want).abs().max().item() / want.abs().max().item()
            for got, want in zip(mapped_source(sent, maps, receiver, ids).kv(0), own.kv(0), strict=True)
        )
        for kind, maps in fitted.items()
    }
    assert worst[EMBEDDING] < 1e-4
    assert worst[LINEAR] > 1e-2


def test_kinds_that_are_fitted_together_are_as_if_fitted_alone():
    sender, receiver = (Decoder(tiny_model("llama", seed)) for seed in (7, 0))
    layers = {"e_layers": [2], "kv_layers": [1]}
    together = fit_maps(sender, receiver, PREFIXES, **layers)
    assert list(together) == list(MapFeatures)
    for kind in (LINEAR, EMBEDDING):
        (alone,) = fit_maps(sender, receiver, PREFIXES, [kind], **layers).values()
        assert (list(alone.e), list(alone.kv)) == ([2], [1])
        assert torch.allclose(together[kind].e[2].weight, alone.e[2].weight, atol=1e-4)
        assert torch.allclose(together[kind].kv[1].weight, alone.kv[1].weight, atol=1e-4)


def test_maps_bring_e_nearer_and_embeddings_nearer_still():
    """Between unrelated models, whose tokens are all that they share."""
    sender, receiver = (Decoder(tiny_model("llama", seed)) for seed in (7, 0))
    fitted = fit_maps(sender, receiver, PREFIXES, (LINEAR, EMBEDDING), kv_layers=[], pair=("a", "b"))
    sent, own = (capture(side, OTHER, [1]) for side in (sender, receiver))
    left = {
        kind: (mapped_source(sent, maps, receiver, OTHER).e(1) - own.e(1)).norm()
        for kind, maps in fitted.items()
    }
    assert left[EMBEDDING] < 0.98 * left[LINEAR]
    assert left[LINEAR] < 0.8 * (sent.e(1) - own.e(1)).norm()
    assert {maps.pair for maps in fitted.values()} == {("a", "b")}


def test_too_few_tokens():
    decoder = Decoder(tiny_model("llama"))
    fitter = MapFitter(decoder, decoder, [LINEAR], e_layers=[1], kv_layers=[])
    fitter.add(tokens(MIN_TOKENS // 5 - 1))
    assert fitter.tokens == 199
    with pytest.raises(
        UsageError, match=r"maps from 199 calibration tokens: allowed are 1,000 tokens or more"
    ):
        fitter.solve()


def test_models_and_layers_that_do_not_fit():
    small, deep = Decoder(tiny_model("llama")), Decoder(tiny_model("llama", num_hidden_layers=6))
    with pytest.raises(UsageError, match=r"maps between models"):
        MapFitter(deep, small, [LINEAR])
    with pytest.raises(UsageError, match=r"maps of layers \[4, 9\]: the models have layers 0-3"):
        MapFitter(small, small, [LINEAR], e_layers=[1, 9], kv_layers=[4])
    with pytest.raises(UsageError, match="allowed are linear, embedding, random"):
        MapFitter(small, small, [])


def test_a_model_that_is_not_finite():
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    decoder = Decoder(broken)
    with pytest.raises(UsageError, match="not finite"):
        fit_maps(decoder, decoder, PREFIXES, [LINEAR], e_layers=[], kv_layers=[1])


def test_maps_repair_the_lab_pair_where_recompute_alone_does_not(tmp_path):
    bench = Bench(BenchSpec(LAB / "models" / "coder", LAB / "models" / "base", "exact-match", 8, 1))
    layers = {"e_layers": [1], "kv_layers": [0]}
    (maps,) = fit_maps(bench.sender, bench.receiver, lab_prefixes(4), [EMBEDDING], **layers).values()
    file = maps.save(tmp_path / "maps.safetensors")
    plans = ("1-2", "1-2+emap", "1-2+emap+kvmap:0")
    scores = {plan: {} for plan in plans}
    for unit in lab_units("base")[:3]:
        for plan, found in bench.run(Task(unit, plans, file)).scores.items():
            scores[plan] |= found
    plain, e_mapped, mapped = (Measures.of(scores[plan]) for plan in plans)
    assert plain.prompts == 24
    assert plain.quality < 0.4
    assert mapped.quality > 0.9
    assert mapped.kl < e_mapped.kl < plain.kl
