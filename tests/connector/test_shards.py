"""Shards: the heads of any degree are made of those of any other."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from droidspeak.connector.shards import Shard
from droidspeak.errors import ConfigError

DEGREES = st.sampled_from([1, 2, 4, 8, 16, 3, 6, 12])


def splits(heads: int, size: int) -> bool:
    return heads % size == 0 or size % heads == 0


@given(heads=st.sampled_from([1, 2, 4, 8, 12]), mine=DEGREES, other=DEGREES, data=st.data())
def test_parts_are_the_heads_in_order(heads, mine, other, data):
    assume(splits(heads, mine) and splits(heads, other))
    shard = Shard(data.draw(st.integers(0, mine - 1)), mine)
    taken = []
    for part in shard.parts(other, heads):
        held = list(part.shard.heads(heads))[part.held]
        assert len(held) == len(range(*part.own.indices(heads)))
        assert part.own.start == len(taken)
        taken += held
    assert taken == list(shard.heads(heads))


def test_ranks_beyond_the_heads_share_one():
    assert [list(Shard(rank, 4).heads(2)) for rank in range(4)] == [[0], [0], [1], [1]]


@pytest.mark.parametrize("degree", [1, 2, 8])
def test_the_own_shard_is_taken_as_it_is(degree):
    (part,) = Shard(degree - 1, degree).parts(degree, 2)
    assert part.shard == Shard(degree - 1, degree)


@pytest.mark.parametrize("text", ["", "1", "2of2", "0of0", "-1of2", "aofb", "0of1 "])
def test_what_is_no_shard(text):
    with pytest.raises(ConfigError, match="RANKofSIZE"):
        Shard.parse(text)


def test_text():
    assert str(Shard.parse("3of16")) == "3of16"
