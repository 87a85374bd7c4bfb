"""The chunk container: its bytes, what reads them, and that no damage goes unseen."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import ChunkCorrupt, ChunkIncomplete, UsageError
from droidspeak.storage.codecs import as_bytes
from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotKind, checksum, coalesce, place
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.testing import DTYPES, assert_holds, make_chunk, make_key

K, V, E = SlotKind.K, SlotKind.V, SlotKind.E
GOLDEN_KEY = ChunkKey(SourceId("ab" * 32), "0of1", "cd" * 32)


def golden_chunk(codec: str = "raw") -> Chunk:
    def ramp(start: int, *shape: int) -> torch.Tensor:
        return torch.arange(start, start + torch.Size(shape).numel()).view(shape).half()

    tensors = {Slot(K, 0): ramp(0, 16, 1, 2), Slot(V, 0): ramp(32, 16, 1, 2), Slot(E, 1): ramp(64, 16, 3)}
    return Chunk.encode(GOLDEN_KEY, tensors, codec=codec, labels={"b": "2", "a": "1"})


# The bytes


def test_golden_header() -> None:
    """The format's bytes. If this fails, stores that exist cannot be read: a new format needs a new name."""
    header = (
        b'{"__metadata__":{"digest":"184b7fc549b80615","format":"droidspeak-chunk-1",'
        b'"key":"' + str(GOLDEN_KEY).encode() + b'","tokens":"16",'
        b'"checksums":"{\\"e.1\\":\\"0f7b8b7d655da232\\",\\"k.0\\":\\"d096af0be3543f17\\",\\"v.0\\":\\"0d735009d13463f6\\"}",'
        b'"coded":"{}","labels":"{\\"a\\":\\"1\\",\\"b\\":\\"2\\"}"},'
        b'"e.1":{"dtype":"F16","shape":[16,3],"data_offsets":[0,96]},'
        b'"k.0":{"dtype":"F16","shape":[16,1,2],"data_offsets":[96,160]},'
        b'"v.0":{"dtype":"F16","shape":[16,1,2],"data_offsets":[160,224]}}'
    )
    encoded = golden_chunk().header.encoded
    assert encoded[8:].rstrip(b" ") == header
    assert encoded[:8] == struct.pack("<Q", len(encoded) - 8)
    assert len(encoded) == 640


def test_golden_object() -> None:
    assert (
        hashlib.sha256(golden_chunk().to_bytes()).hexdigest()
        == "5781858a3c857c601504ae86504609a8184d8444452f05bc9650bf05e458b2f8"
    )


def test_golden_zstd_object_is_still_read() -> None:
    data = bytes.fromhex(
        "b8020000000000007b225f5f6d657461646174615f5f223a7b22646967657374223a22396662353137323834363136653039"
        "33222c22666f726d6174223a2264726f6964737065616b2d6368756e6b2d31222c226b6579223a2261626162616261626162"
        "6162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162"
        "616261622f306f66312f63646364636463646364636463646364636463646364636463646364636463646364636463646364"
        "636463646364636463646364636463646364636463646364222c22746f6b656e73223a223136222c22636865636b73756d73"
        "223a227b5c22652e315c223a5c22633136366563656237663061326332385c222c5c226b2e305c223a5c2262333936313262"
        "3536373230353561375c222c5c22762e305c223a5c22623565346264323630346265353961615c227d222c22636f64656422"
        "3a227b5c22652e315c223a5b5c227a7374645c222c5c224631365c222c5b31362c335d5d2c5c226b2e305c223a5b5c227a73"
        "74645c222c5c224631365c222c5b31362c312c325d5d2c5c22762e305c223a5b5c227a7374645c222c5c224631365c222c5b"
        "31362c312c325d5d7d222c226c6162656c73223a227b5c22615c223a5c22315c222c5c22625c223a5c22325c227d227d2c22"
        "652e31223a7b226474797065223a225538222c227368617065223a5b34305d2c22646174615f6f666673657473223a5b302c"
        "34305d7d2c226b2e30223a7b226474797065223a225538222c227368617065223a5b35375d2c22646174615f6f6666736574"
        "73223a5b34302c39375d7d2c22762e30223a7b226474797065223a225538222c227368617065223a5b34305d2c2264617461"
        "5f6f666673657473223a5b39372c3133375d7d7d202020202020202020202020202020202020202020202020202020202020"
        "2020202028b52ffd2060fd00009800102030405060708090a0b0c0d0e0f05455560400a013d01dae63069f6028b52ffd2040"
        "85010054020000804080c03c404244454647484849494a4a4b4b4c4c4c4c4d4d4d4d4e4e4e4e4f4f4f4f0300bb33b97c3380"
        "0528b52ffd2040fd0000980020406080a0c0e050515253535353535353530400200bc887cbd8c01207"
    )
    expected = golden_chunk()
    chunk = Chunk.from_bytes(data, GOLDEN_KEY)
    assert chunk.header.codec == "zstd"
    assert all(torch.equal(chunk.tensor(slot), expected.tensor(slot)) for slot in expected.payload)


def test_e_comes_first_and_layers_are_contiguous() -> None:
    chunk = make_chunk(1, layers=3, e_layers=(2, 0))
    names = [slot.name for slot in chunk.header.records]
    assert names == ["e.0", "e.2", "k.0", "v.0", "k.1", "v.1", "k.2", "v.2"]
    position = 0
    for record in chunk.header.records.values():
        assert record.start == position
        position = record.end
    assert chunk.header.nbytes == len(chunk.to_bytes()) == chunk.header.data_start + position
    assert (chunk.header.e_layers, chunk.header.kv_layers) == ((0, 2), (0, 1, 2))


def test_data_is_aligned() -> None:
    starts = {make_chunk(1, layers=layers, e_layers=()).header.data_start for layers in range(1, 20)}
    assert all(start % 64 == 0 for start in starts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_safetensors_reader_opens_it(dtype: torch.dtype) -> None:
    chunk = make_chunk(1, dtype=dtype)
    tensors = safetensors.torch.load(chunk.to_bytes())
    assert {Slot.parse(name) for name in tensors} == chunk.payload.keys()
    for name, tensor in tensors.items():
        assert torch.equal(as_bytes(tensor), chunk.payload[Slot.parse(name)])


def test_a_coded_slot_is_a_vector_of_bytes_to_safetensors(tmp_path: Any) -> None:
    chunk = make_chunk(1, codec="zstd")
    (tmp_path / "chunk.safetensors").write_bytes(chunk.to_bytes())
    with safetensors.safe_open(tmp_path / "chunk.safetensors", "pt") as opened:
        assert opened.metadata()["key"] == str(chunk.key)
        assert json.loads(opened.metadata()["coded"])["k.0"] == ["zstd", "BF16", [16, 2, 4]]
        assert torch.equal(opened.get_tensor("k.0"), chunk.payload[Slot(K, 0)])


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(dtype: torch.dtype, codec: str) -> None:
    chunk = make_chunk(1, dtype=dtype, codec=codec)
    again = Chunk.from_bytes(chunk.to_bytes(), chunk.key)
    assert_holds(again, chunk)
    assert again.to_bytes() == chunk.to_bytes()
    for slot in chunk.payload:
        assert torch.equal(as_bytes(again.tensor(slot)), as_bytes(chunk.tensor(slot)))


@given(
    labels=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5),
    tokens=st.integers(0, 5),
    codec=st.sampled_from(["raw", "zstd"]),
)
def test_any_labels_dtypes_and_tokens(
    labels: dict[str, str], dtypes: list[torch.dtype], tokens: int, codec: str
) -> None:
    tensors = {Slot(E, layer): torch.ones(tokens, 3).to(dtype) for layer, dtype in enumerate(dtypes)}
    chunk = Chunk.encode(GOLDEN_KEY, tensors, codec=codec, labels=labels)
    again = Chunk.from_bytes(chunk.to_bytes(), GOLDEN_KEY)
    assert (again.header.labels, again.header.tokens) == (labels, tokens)
    for slot, tensor in tensors.items():
        assert torch.equal(as_bytes(again.tensor(slot)), as_bytes(tensor))


# Damage


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_flipped_byte_is_detected(codec: str) -> None:
    data = golden_chunk(codec).to_bytes()
    for position in range(len(data)):
        for mask in (0x01, 0x20, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= mask
            with pytest.raises(ChunkCorrupt):
                Chunk.from_bytes(bytes(damaged), GOLDEN_KEY)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_truncation_is_detected(codec: str) -> None:
    data = golden_chunk(codec).to_bytes()
    for damaged in (*(data[:end] for end in range(len(data))), data + b"\0", data + data):
        with pytest.raises(ChunkCorrupt):
            Chunk.from_bytes(damaged, GOLDEN_KEY)


@given(st.binary(max_size=300))
def test_random_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(ChunkCorrupt):
        Chunk.from_bytes(data, GOLDEN_KEY)


def test_a_renamed_object_is_detected() -> None:
    with pytest.raises(ChunkCorrupt, match="holds chunk"):
        Chunk.from_bytes(make_chunk(1).to_bytes(), make_key(2))


def test_slots_that_changed_places_are_detected() -> None:
    chunk = make_chunk(1)
    swapped = {**chunk.payload, Slot(K, 0): chunk.payload[Slot(K, 1)], Slot(K, 1): chunk.payload[Slot(K, 0)]}
    with pytest.raises(ChunkCorrupt, match="differs from its checksum"):
        Chunk.from_bytes(Chunk(chunk.header, swapped).to_bytes(), chunk.key)


def forged(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The golden header with a change, and a digest that fits it."""
    table = json.loads(golden_chunk().header.encoded[8:])
    change(table)
    table["__metadata__"] = {"digest": "0" * 16, **table["__metadata__"]}
    return sealed(json.dumps(table, separators=(",", ":")).encode())


def sealed(body: bytes) -> bytes:
    start = len(b'{"__metadata__":{"digest":"')
    digest = xxhash.xxh3_64_hexdigest(body[start + 16 :]).encode()
    return struct.pack("<Q", len(body)) + body[:start] + digest + body[start + 16 :]


def metadata(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda table: table["__metadata__"].update(changes)


def row(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda table: table["v.0"].update(changes)


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": metadata(format="droidspeak-chunk-2"),
    "no format": lambda table: table["__metadata__"].pop("format"),
    "no key": metadata(key="a/b/c"),
    "a number as key": metadata(key=7),
    "no tokens": metadata(tokens=""),
    "other tokens": metadata(tokens="17"),
    "no checksums": metadata(checksums="{}"),
    "checksums are a list": metadata(checksums="[]"),
    "checksums are null": metadata(checksums="null"),
    "coded is a list": metadata(coded="[]"),
    "coded is no JSON": metadata(coded="{"),
    "an unknown codec": metadata(coded='{"v.0":["gzip","F16",[16,1,2]]}'),
    "a codec that is a list": metadata(coded='{"v.0":[[],"F16",[16,1,2]]}'),
    "a coded row that is short": metadata(coded='{"v.0":["zstd"]}'),
    "labels are a number": metadata(labels="3"),
    "labels are nested": metadata(labels='{"a":{"b":1}}'),
    "deep nesting": metadata(labels="[" * 100_000),
    "an unknown dtype": row(dtype="I4"),
    "a dtype that is a list": row(dtype=[]),
    "no dtype": lambda table: table["v.0"].pop("dtype"),
    "a negative shape": row(shape=[16, -1, -2]),
    "a shape of floats": row(shape=[16.0, 1.0, 2.0]),
    "a shape that is a number": row(shape=3),
    "a shape that is text": row(shape="abc"),
    "another shape": row(shape=[16, 1, 3]),
    "no shape": row(shape=[]),
    "offsets with a gap": row(data_offsets=[161, 225]),
    "offsets that overlap": row(data_offsets=[96, 160]),
    "offsets backwards": row(data_offsets=[160, 96]),
    "offsets of floats": row(data_offsets=[160.0, 224.0]),
    "three offsets": row(data_offsets=[160, 170, 224]),
    "a row that is a list": lambda table: table.update({"v.0": []}),
    "an unknown slot": lambda table: table.update({"q.0": table.pop("v.0")}),
    "a slot without a layer": lambda table: table.update({"v": table.pop("v.0")}),
    "a slot of no layer": lambda table: table.update({"v.x": table.pop("v.0")}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_is_corrupt(name: str) -> None:
    with pytest.raises(ChunkCorrupt):
        ChunkHeader.parse(forged(FORGERIES[name]))


def test_the_forger_can_write_a_good_header() -> None:
    assert ChunkHeader.parse(forged(lambda table: None)) == golden_chunk().header


@pytest.mark.parametrize("size", [0, 10, 16 * 1024 * 1024 + 1, 2**63, 2**64 - 1])
def test_header_lengths_are_believable(size: int) -> None:
    with pytest.raises(ChunkCorrupt, match="not believable"):
        ChunkHeader.length(struct.pack("<Q", size))


# Chunks in memory


def test_raw_tensors_are_views() -> None:
    tensor = torch.randn(16, 1, 2)
    chunk = Chunk.encode(GOLDEN_KEY, {Slot(K, 0): tensor})
    assert chunk.payload[Slot(K, 0)].data_ptr() == tensor.data_ptr()
    assert chunk.tensor(Slot(K, 0)).data_ptr() == tensor.data_ptr()


def test_tensors_are_decoded_into_place() -> None:
    for codec in ("raw", "zstd"):
        chunk = make_chunk(1, codec=codec)
        out = torch.empty(16, 2, 4, dtype=torch.bfloat16)
        assert chunk.tensor(Slot(K, 0), out) is out
        assert torch.equal(as_bytes(out), as_bytes(make_chunk(1).tensor(Slot(K, 0))))


@pytest.mark.parametrize("out", [torch.empty(16, 2, 4), torch.empty(16, 8, dtype=torch.bfloat16)])
def test_tensors_do_not_go_where_they_do_not_fit(out: torch.Tensor) -> None:
    with pytest.raises(ChunkCorrupt, match=r"k\.0 is torch\.bfloat16"):
        make_chunk(1).tensor(Slot(K, 0), out)


def test_strided_tensors_are_stored_in_order() -> None:
    tensor = torch.arange(16 * 6.0).view(6, 16).t()
    chunk = Chunk.encode(GOLDEN_KEY, {Slot(E, 0): tensor})
    assert torch.equal(Chunk.from_bytes(chunk.to_bytes(), GOLDEN_KEY).tensor(Slot(E, 0)), tensor)


def test_encode_refuses_what_is_no_chunk() -> None:
    with pytest.raises(UsageError, match="tokens"):
        Chunk.encode(GOLDEN_KEY, {})
    with pytest.raises(UsageError, match=r"tokens \[16, 17\]|\[16, 17\] tokens"):
        Chunk.encode(GOLDEN_KEY, {Slot(K, 0): torch.ones(16, 2), Slot(V, 0): torch.ones(17, 2)})
    with pytest.raises(UsageError, match=r"torch\.int32.*allowed: BF16, F16"):
        Chunk.encode(GOLDEN_KEY, {Slot(K, 0): torch.ones(16, 2, dtype=torch.int32)})


def test_a_part_is_no_object() -> None:
    chunk = make_chunk(1)
    part = Chunk(chunk.header, {Slot(K, 0): chunk.payload[Slot(K, 0)]})
    assert not part.complete
    for use in (part.to_bytes, part.buffers, lambda: part.tensor(Slot(V, 0))):
        with pytest.raises(ChunkIncomplete, match=r"v\.0"):
            use()


def test_the_order_of_the_payload_does_not_matter() -> None:
    chunk = make_chunk(1)
    shuffled = Chunk(chunk.header, dict(reversed(list(chunk.payload.items()))))
    assert shuffled.to_bytes() == chunk.to_bytes()


def test_select_sorts_and_names_what_is_missing() -> None:
    header = make_chunk(1).header
    wanted = [Slot(V, 1), Slot(E, 1), Slot(V, 1), Slot(K, 0)]
    assert [record.slot.name for record in header.select(wanted)] == ["e.1", "k.0", "v.1"]
    assert [record.slot for record in header.select(None)] == list(header.records)
    with pytest.raises(ChunkIncomplete, match=r"lacks e\.0, k\.9"):
        header.select([Slot(K, 9), Slot(K, 0), Slot(E, 0)])


def test_slot_names() -> None:
    for slot in (Slot(K, 0), Slot(V, 31), Slot(E, 7)):
        assert Slot.parse(slot.name) == slot
    assert [slot.name for slot in Slot.kv([2, 0])] == ["k.0", "v.0", "k.2", "v.2"]


# Ranges


@given(picks=st.sets(st.integers(0, 9)), limit=st.integers(1, 2000))
def test_ranges_cover_what_was_asked_for_and_nothing_else(picks: set[int], limit: int) -> None:
    header = make_chunk(1, layers=4, e_layers=(0, 1)).header
    records = [record for index, record in enumerate(header.records.values()) if index in picks]
    groups = list(coalesce(records, limit))
    assert [record for group in groups for record in group] == records
    for group in groups:
        assert len(group) == 1 or group[-1].end - group[0].start <= limit
        assert sum(record.nbytes for record in group) == group[-1].end - group[0].start
    for one, other in pairwise(groups):
        assert one[-1].end < other[0].start or other[0].end - one[0].start > limit


def test_place_uses_what_fits_and_one_arena_for_the_rest() -> None:
    header = make_chunk(1).header
    shape, dtype = (16, 2, 4), torch.bfloat16
    fits = torch.zeros(shape, dtype=dtype)
    into = {
        Slot(K, 0): fits,
        Slot(V, 0): torch.zeros(shape, dtype=torch.float16),
        Slot(K, 1): torch.zeros(4, 2, 16, dtype=dtype).transpose(0, 2),
    }
    placed = place(header.select(None), into)
    assert placed.keys() == header.records.keys()
    assert all(placed[slot].numel() == record.nbytes for slot, record in header.records.items())
    assert placed[Slot(K, 0)].data_ptr() == fits.data_ptr()
    rest = {placed[slot].untyped_storage().data_ptr() for slot in placed if slot != Slot(K, 0)}
    assert len(rest) == 1
    assert not rest & {tensor.untyped_storage().data_ptr() for tensor in into.values()}


def test_place_does_not_read_coded_slots_into_tensors() -> None:
    header = make_chunk(1, codec="zstd").header
    out = torch.zeros(16, 2, 4, dtype=torch.bfloat16)
    placed = place(header.select([Slot(K, 0)]), {Slot(K, 0): out})
    assert placed[Slot(K, 0)].data_ptr() != out.data_ptr()


def test_checksums_are_of_the_stored_bytes() -> None:
    chunk = make_chunk(1, codec="zstd")
    for slot, stored in chunk.payload.items():
        assert chunk.header.records[slot].checksum == checksum(stored)
    assert checksum(torch.tensor(list(b"droidspeak"), dtype=torch.uint8)) == xxhash.xxh3_64_intdigest(
        b"droidspeak"
    )


def test_verify_checks_the_slots_it_is_told() -> None:
    chunk = make_chunk(1)
    damaged = Chunk(chunk.header, {**chunk.payload, Slot(K, 0): chunk.payload[Slot(K, 0)] ^ 1})
    assert damaged.verify([Slot(V, 0)]) is damaged
    with pytest.raises(ChunkCorrupt, match=r"k\.0"):
        damaged.verify()


def test_headers_are_compared_by_what_they_say() -> None:
    header = make_chunk(1).header
    assert ChunkHeader.parse(header.encoded) == header
    assert replace(header, tokens=17) != header
    with pytest.raises(ChunkCorrupt, match="bytes instead of"):
        header.expect(header.key, header.nbytes + 1)
