"""Any bytes, over real sockets: what comes back is what the model of the protocol says, and nothing else.

One daemon serves all examples; each begins with an empty store but for a few objects that must stay.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule

from droidspeak.config import load_settings
from droidspeak.integrations.server.daemon import Daemon

from .wireclient import EXIST, GET, HEALTH, PUT, WireClient, frame, put_frame, wait_until
from .wiremodel import ITEM_BYTES, WireModel

MAX_OBJECT = 4096
EXAMPLES = 400
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def started() -> Daemon:
    section = {"listen": "127.0.0.1:0", "http": None, "max_object": MAX_OBJECT, "drain_timeout": 60}
    return Daemon(load_settings(overrides={"tiers": ["cpu://?capacity=256MiB"], "server": section}))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with started() as daemon:
        yield daemon
        wait_until(lambda: daemon.state.in_flight() == daemon.state.connections() == 0)


def emptied(daemon: Daemon) -> WireModel:
    """The model of a daemon that holds two witnesses and nothing else."""
    store = daemon.state.stores[""]
    for key in list(store.keys()):
        store.delete(key)
    model = WireModel(MAX_OBJECT)
    stream = put_frame(b"witness", b"stays") + put_frame(b"witness@1@0@1f@half", bytes(range(256)))
    with WireClient(daemon.ports["lm"]) as client:
        client.send(stream)
        assert client.end() == model.serve(stream)[0]
    return model


def assert_same(daemon: Daemon, model: WireModel) -> None:
    """All that the model holds reads back so, and nothing else is stored."""
    with WireClient(daemon.ports["lm"]) as client:
        for key, (*_, body) in model.objects.items():
            assert client.exist(key), key
            assert client.get(key) == body, key
    assert len(list(daemon.state.stores[""].keys())) == len(model.objects)


# Few names, so that requests meet.
SOUND = [b"m@1@0@1f@half", b"m@1@0@1F@half", b"m@1@0@1@half@3", b" m", "é@0@0@x@y".encode(), b"x" * 150]
NAMES = st.sampled_from([*SOUND, *SOUND, b"m\t", b"\xff", b"", "é".encode() * 75])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...], int]:
    """fmt, dtype, shape and length that agree."""
    if draw(st.booleans()):
        length = draw(st.integers(1, 300))
        return draw(st.sampled_from((4, 5))), draw(st.integers(0, 8)), (length,), length
    dtype = draw(st.integers(1, 8))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    length = ITEM_BYTES[dtype]
    for dimension in shape:
        length *= dimension
    return draw(st.sampled_from((0, 1, 2, 3, 6, 7, 8))), dtype, tuple(shape), length


@st.composite
def puts(draw: st.DrawFn) -> tuple[bytes, bytes]:
    fmt, dtype, shape, length = draw(shapes())
    body = draw(st.binary(min_size=length, max_size=length))
    header = frame(PUT, draw(NAMES), length=length, fmt=fmt, dtype=dtype, shape=shape)
    return header, body


def asks() -> st.SearchStrategy[tuple[bytes, bytes]]:
    header = st.builds(frame, st.sampled_from((GET, EXIST, HEALTH)), NAMES)
    return st.tuples(header, st.just(b""))


NUMBERS = st.sampled_from((-(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 9, 300, MAX_OBJECT, MAX_OBJECT + 1, 2**31 - 1))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A request with one of its numbers changed, or a bit of it flipped, or its body cut or longer."""
    header, body = draw(st.one_of(puts(), asks()))
    changed = bytearray(header)
    how = draw(st.sampled_from(("number", "signs", "bit", "short", "long")))
    if how == "signs":  # a product stays what it was
        first, second = draw(st.lists(st.integers(5, 8), min_size=2, max_size=2, unique=True))
        for place in (first, second):
            struct.pack_into("i", changed, 4 * place, -struct.unpack_from("i", changed, 4 * place)[0])
    elif how == "number":
        struct.pack_into("i", changed, 4 * draw(st.integers(0, 8)), draw(NUMBERS))
    elif how == "bit":
        changed[draw(st.integers(0, len(changed) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif how == "short":
        body = body[: draw(st.integers(0, len(body)))]
    else:
        body += draw(st.binary(max_size=8))
    return bytes(changed), body


def streams() -> st.SearchStrategy[bytes]:
    sound = st.lists(st.one_of(puts(), asks()), max_size=6)
    odd = st.lists(
        st.one_of(mutated(), mutated(), st.tuples(st.binary(max_size=400), st.just(b""))), max_size=4
    )
    return st.builds(_joined, sound, odd, sound)


def _joined(*parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(header + body for part in parts for header, body in part)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=SLOW, database=None)
@given(stream=streams(), data=st.data())
def test_any_stream_is_answered_as_the_model_says(daemon, stream, data):
    model, counters = emptied(daemon), daemon.state.counters
    wait_until(lambda: daemon.state.connections() == 0)
    ends, refusals = counters.get("closed"), Counter(counters.snapshot().get("refused"))
    answers, ended, refused = model.serve(stream)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4), label="sent in pieces at"))
    reasons = Counter(counters.snapshot().get("closed"))
    with WireClient(daemon.ports["lm"]) as client:
        assert _exchange(client, stream, cuts) == answers
    wait_until(lambda: counters.get("closed") == ends + 1, "the end is counted")
    assert Counter(counters.snapshot().get("closed")) - reasons == Counter([ended])
    assert Counter(counters.snapshot().get("refused")) - refusals == Counter(refused)
    assert_same(daemon, model)


def _exchange(client: WireClient, stream: bytes, cuts: list[int]) -> bytes:
    """Sends all of `stream`, unless the daemon closes before; what it answered until it closed."""
    try:
        for start, end in itertools.pairwise((0, *cuts, len(stream))):
            client.send(stream[start:end])
    except (BrokenPipeError, ConnectionResetError):
        pass
    return client.end()


class Connections(RuleBasedStateMachine):
    """Several clients on the same keys: a GET gives the last complete valid PUT, whoever sent it."""

    clients = Bundle("clients")
    daemon: Daemon
    names = (b"a@1@0@1@half", b"b@1@0@1@half", b"b@1@0@01@half")
    keys = st.sampled_from(names)
    bodies = st.binary(min_size=1, max_size=200)

    @initialize()
    def empty(self) -> None:
        emptied(self.daemon)
        self.kept: dict[bytes, bytes] = {}
        self.open: list[WireClient] = []

    @rule(target=clients)
    def connect(self) -> WireClient:
        client = WireClient(self.daemon.ports["lm"])
        self.open.append(client)
        return client

    @rule(client=clients, key=keys, body=bodies)
    def put(self, client: WireClient, key: bytes, body: bytes) -> None:
        client.put(key, body)
        assert client.exist(key)
        self.kept[key] = body

    @rule(client=clients, key=keys, body=bodies)
    def put_of_a_wrong_shape(self, client: WireClient, key: bytes, body: bytes) -> None:
        client.send(frame(PUT, key, length=len(body), dtype=6, shape=(len(body) + 1,)) + body)

    @rule(client=consumes(clients), key=keys, body=bodies, data=st.data())
    def put_that_is_cut(self, client: WireClient, key: bytes, body: bytes, data: Any) -> None:
        stream = put_frame(key, body)
        client.send(stream[: data.draw(st.integers(0, len(stream) - 1), label="cut after")])
        client.end()

    @rule(client=consumes(clients), noise=st.binary(min_size=186, max_size=250))
    def garbage(self, client: WireClient, noise: bytes) -> None:
        client.send(b"\xff" + noise)
        assert client.end() == b""

    @rule(client=clients, key=keys)
    def get(self, client: WireClient, key: bytes) -> None:
        assert client.get(key) == self.kept.get(key)

    @rule(client=clients, key=keys)
    def exist(self, client: WireClient, key: bytes) -> None:
        assert client.exist(key) is (key in self.kept)

    def teardown(self) -> None:
        for client in self.open:
            client.close()
        with WireClient(self.daemon.ports["lm"]) as client:
            for key in self.names:
                assert client.get(key) == self.kept.get(key)


def test_many_connections_meet_on_the_same_keys():
    with started() as daemon:
        machine = type("ConnectionsHere", (Connections,), {"daemon": daemon})
        limits = settings(
            max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None
        )
        machine.TestCase.settings = limits
        machine.TestCase("runTest").runTest()
