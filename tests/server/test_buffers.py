from __future__ import annotations

import gc

import torch

from droidspeak.integrations.server.buffers import Buffers

MIB = 1 << 20


def test_memory_comes_back_when_nothing_refers_to_it():
    buffers = Buffers()
    taken = buffers.take(MIB)
    place = taken.data_ptr()
    taken.fill_(7)
    view = taken.view(torch.bfloat16).view(-1, 256)[3:5]
    del taken
    gc.collect()
    assert buffers.idle == 0  # the view still refers to it
    assert int(view.view(torch.uint8)[0, 0]) == 7
    del view
    assert buffers.idle == MIB
    again = buffers.take(MIB - 5)  # the same pages
    assert again.data_ptr() == place
    assert again.numel() == MIB - 5
    assert buffers.idle == 0


def test_two_objects_never_share_memory():
    buffers = Buffers()
    for _ in range(20):
        held = [buffers.take(300_000) for _ in range(5)]
        for number, tensor in enumerate(held):
            tensor.fill_(number)
        assert [int(tensor.max()) for tensor in held] == list(range(5))
        assert [int(tensor.min()) for tensor in held] == list(range(5))


def test_what_is_kept_is_bounded_and_the_size_asked_for_last_stays():
    buffers = Buffers(idle=4 * MIB)
    old = [buffers.take(MIB) for _ in range(8)]
    old.clear()
    assert buffers.idle == 4 * MIB
    new = [buffers.take(3 * MIB // 2) for _ in range(2)]
    places = {tensor.data_ptr() for tensor in new}
    new.clear()
    assert buffers.idle <= 4 * MIB
    assert {buffers.take(3 * MIB // 2).data_ptr()} <= places


def test_small_objects_take_no_pages():
    buffers = Buffers()
    buffers.take(1000)
    assert buffers.idle == 0
    assert buffers.take(0).numel() == 0
