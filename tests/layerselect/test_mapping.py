"""Ridge fits, the features that they see, and the file that they are kept in."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors

from droidspeak.errors import MapsUnusable, UsageError
from droidspeak.layerselect import FrontierPoint, MapFile, Plan, Policy
from droidspeak.layerselect.mapfeatures import columns, e_features, kv_features
from droidspeak.layerselect.mapping import MapCache, MapFeatures, Maps
from droidspeak.layerselect.ridge import _HELD_BACK, _STRENGTHS, LinearMap, RidgeFit

GOLDEN = Path(__file__).parents[1] / "data" / "maps-1.safetensors"
HIDDEN, HEADS, DIM = 4, 2, 2
PAIR = ("a" * 64, "b" * 64)


def rows(count: int, features: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of different means and scales, and outputs that follow from them but for some noise."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=source, dtype=torch.float64)
    x = x * (1 + torch.arange(features)) + 3
    weight = torch.randn(features, outputs, generator=source, dtype=torch.float64)
    return x, x @ weight + 0.3 * torch.randn(count, outputs, generator=source, dtype=torch.float64) - 1


def fitted(x: torch.Tensor, y: torch.Tensor, *, at: tuple[int, ...] = ()) -> RidgeFit:
    """A fit that got its rows in pieces, cut before the rows `at`."""
    fit = RidgeFit(x.shape[1], y.shape[1])
    edges = [0, *sorted(at), len(x)]
    for start, end in itertools.pairwise(edges):
        fit.add(x[start:end], y[start:end])
    return fit


def plain_ridge(x: numpy.ndarray, y: numpy.ndarray, strength: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Ridge of standardised columns as a least-squares problem of all rows at once."""
    mean, scale = x.mean(0), x.std(0)
    z = numpy.vstack([(x - mean) / scale, numpy.sqrt(strength * len(x)) * numpy.eye(x.shape[1])])
    target = numpy.vstack([y - y.mean(0), numpy.zeros((x.shape[1], y.shape[1]))])
    weight = numpy.linalg.lstsq(z, target, rcond=None)[0] / scale[:, None]
    return weight, y.mean(0) - mean @ weight


@settings(deadline=None)
@given(st.data())
def test_a_streamed_fit_is_the_ridge_of_all_rows(data):
    count, features = data.draw(st.integers(12, 80)), data.draw(st.integers(1, 8))
    x, y = rows(count, features, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1000)))
    at = data.draw(st.lists(st.integers(0, count), max_size=4))
    found = fitted(x, y, at=tuple(at)).solve()
    x, y = x.numpy(), y.numpy()
    held = numpy.arange(count) % _HELD_BACK == _HELD_BACK - 1
    solutions = [plain_ridge(x[~held], y[~held], strength) for strength in _STRENGTHS]
    errors = [numpy.square(x[held] @ weight + bias - y[held]).sum() for weight, bias in solutions]
    best = [
        plain_ridge(x, y, s) for s, e in zip(_STRENGTHS, errors, strict=True) if e <= min(errors) * 1.0001
    ]
    assert any(numpy.allclose(found.weight, weight, atol=1e-4) for weight, _ in best)
    assert any(numpy.allclose(found.bias, bias, atol=1e-3) for _, bias in best)


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(1, 12), st.integers(0, 100))
def test_fits_that_are_merged_are_one_fit(first, others, seed):
    # Pieces of five rows hold back the same ones on their own.
    x, y = rows(5 * (first + others), 4, 2, seed)
    merged = fitted(x[: 5 * first], y[: 5 * first])
    merged.merge(fitted(x[5 * first :], y[5 * first :]))
    together = fitted(x, y)
    assert merged.rows == together.rows == len(x)
    assert torch.allclose(merged.solve().weight, together.solve().weight, atol=1e-5)


def test_leading_columns_are_a_fit_of_their_own():
    x, y = rows(60, 6, 2)
    wide, narrow = fitted(x, y).solve(4), fitted(x[:, :4], y).solve()
    assert torch.allclose(wide.weight, narrow.weight, atol=1e-6)
    assert torch.allclose(wide.bias, narrow.bias, atol=1e-5)


def test_columns_far_from_zero_and_constant_ones_do_no_harm():
    x, y = rows(100, 3, 2)
    odd = torch.cat([x + 1e6, torch.full((100, 1), 0.1), torch.zeros(100, 1)], 1)
    weight = fitted(odd, y).solve().weight
    assert torch.allclose(weight[:3], fitted(x, y).solve().weight, atol=1e-4)
    assert not weight[3:].any()


def test_noise_is_regularised_and_a_law_is_not():
    source = torch.Generator().manual_seed(1)
    x = torch.randn(60, 40, generator=source, dtype=torch.float64)
    noise = torch.randn(60, 1, generator=source, dtype=torch.float64)
    law = x @ torch.ones(40, 1, dtype=torch.float64)
    free = torch.linalg.lstsq(x, noise).solution
    assert fitted(x, noise).solve().weight.norm() < 0.7 * free.norm()
    assert torch.allclose(fitted(x, law).solve().weight, torch.ones(40, 1), atol=1e-5)


def test_too_few_rows_and_rows_that_are_not_finite_are_refused():
    x, y = rows(20, 3, 1)
    with pytest.raises(UsageError, match=r"of 4 rows: allowed are 5 or more"):
        fitted(x[:4], y[:4]).solve()
    y[7] = float("inf")
    with pytest.raises(UsageError, match="not finite"):
        fitted(x, y).solve()


# Features


def inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """E, K, V and embeddings of `count` tokens."""
    source = torch.Generator().manual_seed(seed)
    e, embeddings = (torch.randn(count, HIDDEN, generator=source) for _ in range(2))
    k, v = (torch.randn(count, HEADS, DIM, generator=source) for _ in range(2))
    return e, k, v, embeddings


def test_each_kind_begins_with_the_columns_of_the_one_before():
    e, k, v, embeddings = inputs(9)
    for mapped, features in (
        (2 * HIDDEN, lambda kind: e_features(kind, e, embeddings)),
        (2 * HEADS * DIM, lambda kind: kv_features(kind, k, v, embeddings)),
    ):
        widest = features(MapFeatures.RANDOM)
        for kind in MapFeatures:
            width = columns(kind, mapped, HIDDEN)
            assert torch.equal(features(kind), widest[:, :width])
        assert widest.shape == (9, columns(MapFeatures.RANDOM, mapped, HIDDEN))


@pytest.mark.parametrize("kind", MapFeatures)
def test_rows_at_the_end_see_the_tokens_before_them(kind):
    e, k, v, embeddings = inputs(9)
    assert torch.equal(e_features(kind, e[4:], embeddings), e_features(kind, e, embeddings)[4:])
    assert torch.equal(kv_features(kind, k[4:], v[4:], embeddings), kv_features(kind, k, v, embeddings)[4:])


def test_embeddings_count_by_direction_and_only_those_near():
    e, _, _, embeddings = inputs(9)
    seen = e_features(MapFeatures.EMBEDDING, e, embeddings)
    assert torch.allclose(e_features(MapFeatures.EMBEDDING, e, 100 * embeddings), seen, atol=1e-3)
    embeddings[2] += 1
    changed = (e_features(MapFeatures.EMBEDDING, e, embeddings) != seen).any(1).nonzero().flatten()
    assert changed.tolist() == [2, 3, 4]


# Maps and their file


def linear(features: int, outputs: int, seed: int = 0) -> LinearMap:
    """Weights that are the same everywhere."""
    cells = (torch.arange(features * outputs) * 37 + seed * 11) % 101
    return LinearMap(
        (cells.reshape(features, outputs).float() - 50) / 400, torch.arange(outputs).float() / 8 - seed
    )


def maps(kind: MapFeatures = MapFeatures.EMBEDDING, hidden: int = HIDDEN) -> Maps:
    """E of layers 1 and 2, K and V of layers 0 and 3."""
    e = {n: linear(columns(kind, 2 * hidden, hidden), hidden, n) for n in (1, 2)}
    kv_columns = 2 * HEADS * DIM
    kv = {n: linear(columns(kind, kv_columns, hidden), kv_columns, n) for n in (0, 3)}
    return Maps(kind, e, kv, PAIR)


def same(first: Maps, second: Maps) -> bool:
    return (first.features, first.pair) == (second.features, second.pair) and all(
        mine.keys() == theirs.keys()
        and all(
            torch.equal(mine[n].weight, theirs[n].weight) and torch.equal(mine[n].bias, theirs[n].bias)
            for n in mine
        )
        for mine, theirs in ((first.e, second.e), (first.kv, second.kv))
    )


@pytest.mark.parametrize("kind", MapFeatures)
@pytest.mark.parametrize("pair", [PAIR, None])
def test_a_file_holds_the_maps(kind, pair, tmp_path):
    kept = replace(maps(kind), pair=pair)
    file = kept.save(tmp_path / "maps.safetensors")
    assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    assert same(Maps.load(file), kept)
    assert os.listdir(tmp_path) == ["maps.safetensors"]
    assert set(safetensors.load_file(file.path)) >= {"e.1.weight", "e.1.bias", "kv.3.weight", "kv.3.bias"}


def test_a_file_of_the_first_format_stays_readable_and_says_the_same():
    held = Maps.load(MapFile(GOLDEN, hashlib.sha256(GOLDEN.read_bytes()).hexdigest()))
    assert same(held, maps(MapFeatures.RANDOM))
    cells = torch.arange(3 * HIDDEN).reshape(3, HIDDEN) / 10
    k = cells.reshape(3, HEADS, DIM)
    e = held.map_e(1, cells, cells.flip(0))
    mapped_k, mapped_v = held.map_kv(3, k, -k, cells.flip(0))
    # To the digits that float32 has anywhere: the random features are made of the same bits everywhere.
    assert e[2].tolist() == pytest.approx(GOLDEN_E, abs=1e-5)
    assert [*mapped_k[2].flatten().tolist(), *mapped_v[2].flatten().tolist()] == pytest.approx(
        GOLDEN_KV, abs=1e-5
    )


GOLDEN_E = [-0.603835, -4.263309, 0.030879, -0.056612]
GOLDEN_KV = [-1.466608, -6.755017, -1.44145, -3.488998, -3.11902, 0.205019, -2.984168, -4.507038]


@pytest.mark.parametrize("kind", MapFeatures)
def test_maps_are_affine_in_their_features(kind):
    e, k, v, embeddings = inputs(2600)
    held = maps(kind)
    x = e_features(kind, e, embeddings)
    assert torch.allclose(held.map_e(2, e, embeddings), held.e[2](x), atol=1e-4)
    mapped_k, mapped_v = held.map_kv(3, k, v, embeddings)
    x = held.kv[3](kv_features(kind, k, v, embeddings))
    assert torch.allclose(mapped_k, x[:, : HEADS * DIM].reshape(k.shape), atol=1e-4)
    assert torch.allclose(mapped_v, x[:, HEADS * DIM :].reshape(v.shape), atol=1e-4)


def test_mapped_e_has_the_dtype_of_e_and_no_rows_give_none():
    e, k, v, embeddings = inputs(5)
    assert maps().map_e(1, e.bfloat16(), embeddings.bfloat16()).dtype is torch.bfloat16
    assert maps().map_e(1, e[:0], embeddings).shape == (0, HIDDEN)
    assert maps().map_kv(0, k[:0], v[:0], embeddings)[0].shape == (0, HEADS, DIM)


def test_maps_that_are_not_there_or_for_another_shape():
    e, k, v, embeddings = inputs(5)
    with pytest.raises(MapsUnusable, match=r"no map e\.3; there are \[1, 2\]"):
        maps().map_e(3, e, embeddings)
    with pytest.raises(MapsUnusable, match=r"map kv\.0 is \[.*\]; this model needs \["):
        maps(hidden=8).map_kv(0, k, v, embeddings)
    maps().require(Plan.parse("1-2+emap+kvmap:0,3", 4))
    maps().require(Plan.parse("3-3", 4))
    with pytest.raises(MapsUnusable, match=r"plan 3-3\+emap\+kvmap needs maps .*: e\.3, kv\.1, kv\.2"):
        maps().require(Plan.parse("3-3+emap+kvmap", 4))


def damaged(change) -> bytes:
    """A file that was altered before its digest was taken."""
    tensors = maps()._tensors()
    header = {"format": "droidspeak-maps-1", "features": "embedding", "pair": None}
    change(tensors, header)
    return safetensors.save(tensors, {"droidspeak": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, header: header.update(format="droidspeak-maps-9"), "allowed is droidspeak-maps-1"),
        (lambda tensors, header: header.update(features="cubic"), "cubic"),
        (lambda tensors, header: header.pop("pair"), "pair"),
        (lambda tensors, header: tensors["e.1.weight"].fill_(float("nan")), r"e\.1 is not finite"),
        (lambda tensors, header: tensors["kv.0.bias"].fill_(float("inf")), r"kv\.0 is not finite"),
        (lambda tensors, header: tensors.update({"e.2.bias": torch.zeros(3)}), r"e\.2 has weights"),
        (lambda tensors, header: tensors.pop("e.2.bias"), r"e\.2\.bias"),
        (lambda tensors, header: tensors.update({"q.1.weight": torch.zeros(3, 3)}), "q"),
        (lambda tensors, header: tensors.update({"stray": torch.zeros(3)}), "unpack"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_whatever_its_digest(change, says, tmp_path):
    path, data = tmp_path / "maps.safetensors", damaged(change)
    path.write_bytes(data)
    with pytest.raises(MapsUnusable, match=says):
        Maps.load(MapFile(path, hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 7, b"\x08" + b"\x00" * 7 + b'{"a": 1}', bytes(range(100, 200))],
    ids=["empty", "short", "no-metadata", "noise"],
)
def test_a_file_that_is_none_is_refused(data, tmp_path):
    path = tmp_path / "maps.safetensors"
    path.write_bytes(data)
    with pytest.raises(MapsUnusable):
        Maps.load(MapFile(path, hashlib.sha256(data).hexdigest()))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_byte_that_changed_is_found(tmp_path_factory, data):
    file = maps().save(tmp_path_factory.mktemp("maps") / "maps.safetensors")
    content = bytearray(file.path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.path.write_bytes(content)
    with pytest.raises(MapsUnusable, match="SHA-256 differs"):
        Maps.load(file)


def test_a_file_that_is_not_there():
    with pytest.raises(MapsUnusable, match="cannot be read: No such file"):
        Maps.load(MapFile(Path("nowhere.safetensors"), "0" * 64))


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        maps().save(tmp_path / "taken")
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        maps().save(tmp_path / "nowhere" / "maps.safetensors")
    assert os.listdir(tmp_path) == ["taken"]


def policy(file: MapFile | None, pair: tuple[str, str] = PAIR) -> Policy:
    plan = "1-2+emap" if file else "1-2"
    return Policy(*pair, (FrontierPoint(Plan.parse(plan, 4), 1.0),), maps=file)


def test_each_file_is_loaded_once_until_the_policy_names_another(tmp_path):
    cache, path = MapCache(), tmp_path / "maps.safetensors"
    first = maps().save(path)
    held = cache.get(policy(first))
    path.unlink()
    assert cache.get(policy(first)) is held
    second = maps(MapFeatures.LINEAR).save(path)
    assert cache.get(policy(second)).features is MapFeatures.LINEAR


def test_a_file_that_was_refused_is_tried_again_when_it_changes(tmp_path):
    cache, path = MapCache(), tmp_path / "maps.safetensors"
    file = maps().save(path)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(MapsUnusable, match="SHA-256"):
        cache.get(policy(file))
    path.write_bytes(sound)
    os.utime(path, ns=(1, 1))
    with pytest.raises(MapsUnusable, match="SHA-256"):
        cache.get(policy(file))
    os.utime(path, ns=(2, 2))
    assert same(cache.get(policy(file)), maps())


def test_a_file_for_another_pair_or_no_file(tmp_path):
    file = maps().save(tmp_path / "maps.safetensors")
    with pytest.raises(MapsUnusable, match="another pair"):
        MapCache().get(policy(file, PAIR[::-1]))
    anybody = replace(maps(), pair=None).save(tmp_path / "any.safetensors")
    assert MapCache().get(policy(anybody, PAIR[::-1])).pair is None
    with pytest.raises(MapsUnusable, match="no maps"):
        MapCache().get(policy(None))
