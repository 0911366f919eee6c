"""Large tensors between processes of one machine stay in shared memory; small ones, and other machines', travel."""

from __future__ import annotations

import errno
import math
import os
import threading

import pytest
import torch

from experts.errors import RequestError, SegmentUnreachable
from experts.group import ExpertGroup
from experts.server import ExpertServer
from experts.spec import ExpertCall
from experts.wire import client, own_address, shared_memory
from experts.wire.client import ExpertClient
from experts.wire.shared_memory import MappedSegments, Segment, SegmentPool

HIDDEN = 32
LARGE = 4000


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every message that a client sends."""
    sizes: list[int] = []
    encode = client.encode_call

    def counted(*args: object, **kwargs: object) -> bytes:
        message = encode(*args, **kwargs)  # type: ignore[arg-type]
        sizes.append(len(message))
        return message

    monkeypatch.setattr(client, "encode_call", counted)
    return sizes


def make_call(num_tokens: int, seed: int = 0) -> ExpertCall:
    return ExpertCall(
        layer=0,
        hidden_TH=torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)),
        expert_ids_S=torch.tensor([1], dtype=torch.int32),
        offsets_S1=torch.tensor([0, 1], dtype=torch.int32),
        token_rows_R=torch.tensor([num_tokens - 1], dtype=torch.int32),
        weights_R=torch.ones(1),
    )


def left_behind() -> set[str]:
    return {name for name in os.listdir(shared_memory.DIRECTORY) if name.startswith("expertmesh-")}


@pytest.mark.parametrize(
    ("hidden_dtype", "reply_dtype", "tolerance"),
    [(None, torch.float32, 0.0), (torch.bfloat16, torch.bfloat16, 2e-2), (torch.float8_e4m3fn, torch.bfloat16, 0.2)],
)
def test_a_large_call_carries_places_and_a_small_one_data(
    loaded_group: ExpertGroup,
    server: ExpertServer,
    sent: list[int],
    hidden_dtype: torch.dtype | None,
    reply_dtype: torch.dtype,
    tolerance: float,
) -> None:
    before = left_behind()
    experts = ExpertClient(hidden_dtype=hidden_dtype, reply_dtype=reply_dtype)
    small, large = make_call(3), make_call(LARGE)
    for call in (small, large, small, large):
        got = experts.send("group", server.address, call).result(30)
        torch.testing.assert_close(got, loaded_group.forward(call), rtol=tolerance, atol=tolerance)
    scales = LARGE * 4 if hidden_dtype is torch.float8_e4m3fn else 0
    assert max(sent[1], sent[3]) < 200 + scales
    assert left_behind() == before, "a segment loses its name with its first answer"
    experts.close()


def test_the_caller_may_share_everything_or_nothing(
    loaded_group: ExpertGroup, server: ExpertServer, sent: list[int]
) -> None:
    for shared_bytes, call in ((0, make_call(3)), (math.inf, make_call(LARGE))):
        experts = ExpertClient(shared_bytes=shared_bytes)
        got = experts.send("group", server.address, call).result(30)
        torch.testing.assert_close(got, loaded_group.forward(call), rtol=0, atol=0)
        experts.close()
    assert sent[0] < 200
    assert sent[1] > make_call(LARGE).hidden_TH.nbytes


def test_answers_survive_the_reuse_of_their_segment(loaded_group: ExpertGroup, server: ExpertServer) -> None:
    experts = ExpertClient()
    calls = [make_call(LARGE, seed) for seed in range(4)]
    got = [experts.send("group", server.address, call).result(30) for call in calls]
    for answer, call in zip(got, calls, strict=True):
        torch.testing.assert_close(answer, loaded_group.forward(call), rtol=0, atol=0)
    experts.close()


def test_calls_at_once_have_a_segment_each(loaded_group: ExpertGroup, server: ExpertServer) -> None:
    experts = ExpertClient()
    calls = [make_call(LARGE, seed) for seed in range(4)]
    replies = [experts.send("group", server.address, call) for call in calls]
    replies.pop(1).cancel()
    calls.pop(1)
    for reply, call in zip(replies, calls, strict=True):
        torch.testing.assert_close(reply.result(30), loaded_group.forward(call), rtol=0, atol=0)
    experts.close()


def test_a_group_elsewhere_gets_the_data_itself(
    loaded_group: ExpertGroup, server: ExpertServer, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here(segment: str) -> None:
        raise SegmentUnreachable(f"shared.segment: no {segment} on this machine", "shared")

    monkeypatch.setattr(shared_memory, "_map", not_here)
    experts = ExpertClient()
    call = make_call(LARGE)
    for _ in range(2):
        got = experts.send("group", server.address, call).result(30)
        torch.testing.assert_close(got, loaded_group.forward(call), rtol=0, atol=0)
    data = call.hidden_TH.nbytes
    assert [size > data for size in sent] == [False, True, True], "tried once, then sent"
    experts.close()


@pytest.mark.parametrize(
    ("address", "own"),
    [("127.0.0.1:1", True), ("localhost:1", True), ("192.0.2.1:1", False), ("no-such-host.invalid:1", False)],
)
def test_only_own_addresses_are_tried(address: str, own: bool) -> None:
    assert own_address.is_own(address) is own


def test_a_full_machine_sends_the_data(
    loaded_group: ExpertGroup, server: ExpertServer, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = left_behind()
    experts = ExpertClient()
    call = make_call(LARGE)
    got = experts.send("group", server.address, call).result(30)
    torch.testing.assert_close(got, loaded_group.forward(call), rtol=0, atol=0)
    assert sent[0] > call.hidden_TH.nbytes
    assert left_behind() == before
    experts.close()


@pytest.mark.parametrize("name", ["../etc/passwd", "expertmesh-1", "expertmesh-" + "g" * 32, "/dev/shm/x", ""])
def test_only_names_of_segments_are_opened(name: str) -> None:
    with pytest.raises(RequestError, match="32 hexadecimal digits"):
        MappedSegments().view(name, 0, 1)


def test_what_is_not_our_file_is_not_mapped() -> None:
    name = "expertmesh-" + "0" * 32
    with pytest.raises(SegmentUnreachable, match="no expertmesh-0"):
        MappedSegments().view(name, 0, 1)
    link = shared_memory.DIRECTORY / name
    link.symlink_to("/etc/hostname")
    try:
        with pytest.raises(SegmentUnreachable):
            MappedSegments().view(name, 0, 1)
    finally:
        link.unlink()


def test_nothing_beyond_a_segment_is_read() -> None:
    segment = Segment(1 << 20)
    try:
        mapped = MappedSegments()
        assert len(mapped.view(segment.name, 0, 1 << 20)) == 1 << 20
        with pytest.raises(RequestError, match="shared: 1 bytes at 1048576"):
            mapped.view(segment.name, 1 << 20, 1)
    finally:
        segment.unlink()


def test_a_pool_lends_a_segment_to_one_at_a_time() -> None:
    pool = SegmentPool()
    lent: list[Segment] = []

    def borrow() -> None:
        for _ in range(50):
            segment = pool.take(1000)
            assert segment is not None
            assert segment not in lent
            lent.append(segment)
            lent.remove(segment)
            pool.give_back(segment)

    threads = [threading.Thread(target=borrow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(RequestError, match="not ours"):
        pool.view("expertmesh-" + "0" * 32, 0, 1)
    pool.close()
    assert pool.take(1000) is None
