"""Keys: the prefix hash chain and the chunk key."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import UsageError
from droidspeak.storage.keys import ChunkKey, PrefixHasher, SourceId, salt_tag

CHUNK = 16
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=100)
HEX = "0123456789abcdef" * 4


def links(tokens: Any, salt: str = "", chunk_size: int = CHUNK) -> list[str]:
    return PrefixHasher(chunk_size, salt).hashes(tokens)


def test_golden_links() -> None:
    """These values are in every store there is: if this fails, all stored caches are lost."""
    assert links(range(512), chunk_size=256) == [
        "90d877d3d8de0e7122ad1e2d97e1dfd1793c5879e65a6a334db9275a5dad5cac",
        "ff8a666e5c829ffbec5641be7022609d8fc8eebd955aae00b64162d8557404a9",
    ]
    assert links([0] * 16) == ["1992eec37f23cdfd19b994c07d175e1068dd2dfb23508f4078171a53e8e4077f"]
    assert links([2**31 - 1] * 16, salt="tenant ä") == [
        "fdb0e61996ffd912432e03fa12c1b1dce30eaff88c887faba284eafc3f1c55f6"
    ]


def test_links_are_what_the_module_says() -> None:
    root = hashlib.sha256(b"droidspeak prefix 1" + (3).to_bytes(4, "little") + b"abc").digest()
    first = hashlib.sha256(root + np.arange(16, dtype="<i4").tobytes()).digest()
    second = hashlib.sha256(first + np.arange(16, 32, dtype="<i4").tobytes()).digest()
    assert links(range(40), salt="abc") == [first.hex(), second.hex()]


@given(TOKENS)
def test_one_link_for_each_full_chunk(tokens: list[int]) -> None:
    found = links(tokens)
    assert len(found) == len(tokens) // CHUNK
    assert len(set(found)) == len(found)


@given(TOKENS, TOKENS)
def test_equal_prefixes_have_equal_links(tokens: list[int], more: list[int]) -> None:
    before = links(tokens)
    assert links(tokens + more)[: len(before)] == before


@given(st.lists(st.integers(0, 2**31 - 1), min_size=CHUNK, max_size=100), st.data())
def test_a_changed_token_changes_its_link_and_all_later_ones(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**31 - 1).filter(lambda token: token != tokens[place]))
    changed = [*tokens[:place], other, *tokens[place + 1 :]]
    old, new = links(tokens), links(changed)
    same = place // CHUNK
    assert old[:same] == new[:same]
    assert not set(old[same:]) & set(new)


@given(TOKENS, st.text(max_size=8), st.text(max_size=8))
def test_salts_are_worlds_apart(tokens: list[int], one: str, other: str) -> None:
    shared = set(links(tokens, one)) & set(links(tokens, other))
    assert bool(shared) == (one == other and len(tokens) >= CHUNK)


def test_a_salt_cannot_be_moved_into_the_tokens() -> None:
    tokens = np.frombuffer(b"a" * 64, dtype="<i4")
    assert not set(links(tokens, "a")) & set(links(tokens, "aa")) & set(links(tokens))


@given(st.lists(st.integers(0, 2**31 - 1), min_size=64, max_size=64))
def test_chunk_sizes_are_apart(tokens: list[int]) -> None:
    assert not set(links(tokens, chunk_size=16)) & set(links(tokens, chunk_size=32))


@given(st.lists(st.integers(0, 30_000), max_size=64))
def test_all_kinds_of_token_ids_agree(tokens: list[int]) -> None:
    expected = links(tokens)
    assert links(tuple(tokens)) == expected
    for dtype in (np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4", ">i8"):
        assert links(np.array(tokens, dtype=dtype)) == expected
    for kind in (torch.int16, torch.int32, torch.int64):
        assert links(torch.tensor(tokens, dtype=kind)) == expected


def test_strided_token_ids_agree() -> None:
    assert links(np.arange(64)[::2]) == links(torch.arange(64)[::2]) == links(range(0, 64, 2))


@pytest.mark.parametrize(
    "tokens",
    [
        [-1] * 16,
        [2**31] * 16,
        [2**70],
        [1.0] * 16,
        ["1"] * 16,
        [None],
        bytes(16),
        bytearray(64),
        "a" * 16,
        np.array([-1]),
        np.array([2**31]),
        np.array([1.0]),
        np.array([True]),
        np.zeros((2, 16), dtype=int),
        np.array(5),
        torch.tensor([-1]),
        torch.tensor([2**31]),
        torch.tensor([1.0]),
        torch.zeros(1, 16, dtype=torch.int64),
    ],
    ids=repr,
)
def test_what_are_no_token_ids(tokens: Any) -> None:
    with pytest.raises(UsageError, match="token ids must"):
        links(tokens)


@pytest.mark.parametrize(
    "tokens", [[], (), range(15), np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int32)]
)
def test_less_than_a_chunk_has_no_name(tokens: Any) -> None:
    assert links(tokens) == []


@pytest.mark.parametrize("chunk_size", [0, 1, 8, 15, 17, 48, 255, -16])
def test_chunk_sizes_are_powers_of_two_from_16(chunk_size: int) -> None:
    with pytest.raises(UsageError, match="powers of two from 16"):
        PrefixHasher(chunk_size)


def test_chunk_key_round_trip() -> None:
    key = ChunkKey(SourceId(HEX), "3of8", HEX[::-1])
    assert ChunkKey.parse(str(key)) == key
    assert str(key) == f"{HEX}/3of8/{HEX[::-1]}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        f"{HEX}/0of1",
        f"{HEX}/0of1/{HEX}/",
        f"/{HEX}/0of1/{HEX}",
        f"{HEX.upper()}/0of1/{HEX}",
        f"{HEX[1:]}/0of1/{HEX}",
        f"{HEX}/0of1/{HEX}0",
        f"{HEX}/0of1/{HEX}\n",
        f"{HEX}//{HEX}",
        f"{HEX}/0-1/{HEX}",
        f"{HEX}/../{HEX}",
        f"{HEX}/٣of٤/{HEX}",
        f"{HEX}/12345of1/{HEX}",
    ],
)
def test_what_is_no_chunk_key(text: str) -> None:
    with pytest.raises(UsageError, match="not a chunk key"):
        ChunkKey.parse(text)


def test_keys_sort_by_source_shard_and_prefix() -> None:
    keys = [
        ChunkKey(SourceId(source * 64), shard, prefix * 64)
        for source in "ab"
        for shard in ("0of2", "1of2")
        for prefix in "cd"
    ]
    assert sorted(keys, reverse=True) == keys[::-1]
    assert all(one < other for one, other in pairwise(keys))


def test_a_salt_has_a_tag_that_does_not_tell_it() -> None:
    assert salt_tag("") == ""
    assert salt_tag("tenant") == hashlib.sha256(b"droidspeak salt tag 1tenant").hexdigest()[:16]
    assert salt_tag("tenant") != salt_tag("tenant2")
