import pytest
import torch

from experts.errors import ConfigError
from experts.ops.slots import ALIGNMENT, SlotStorage, lay_out


def storage(**kwargs):
    layout = lay_out({"up": ((3, 100), torch.float16), "scale": ((3,), torch.float32)})
    return SlotStorage(layout, torch.device("cpu"), **kwargs)


def test_parts_are_aligned_and_do_not_overlap():
    layout = lay_out({"a": ((7,), torch.uint8), "b": ((3, 100), torch.float16), "c": ((1,), torch.float32)})
    assert [part.offset for part in layout.values()] == [0, ALIGNMENT, 4 * ALIGNMENT]


def test_growing_moves_nothing():
    slots = storage(chunk_bytes=2048)
    first = slots.place(5)
    first["up"].fill_(1.0)
    before = slots.addresses[5].item()
    for slot in range(6, 20):
        slots.place(slot)["up"].fill_(float(slot))
    assert slots.addresses[5] == before == first["up"].data_ptr()
    assert len(set(slots.addresses[5:20].tolist())) == 15
    assert slots.place(5)["up"].unique().tolist() == [1.0]
    assert slots.place(19)["up"].unique().tolist() == [19.0]


def test_freed_room_goes_to_the_next_slot():
    slots = storage()
    room = slots.place(0)["up"].data_ptr()
    slots.free(0)
    assert 0 not in slots
    assert slots.place(9)["up"].data_ptr() == room


def test_a_full_card_says_what_to_do(monkeypatch):
    slots = storage()

    def no_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(ConfigError, match="more groups, or quantise"):
        slots.place(0)


def test_too_many_slots():
    with pytest.raises(ConfigError, match=r"slot 4: .* at most 4"):
        storage(max_slots=4).place(4)
