"""Lanes by hand: what compiled code writes to them, and the sum of what it reads."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from experts.errors import ExpertNotResident
from experts.ops._numba.object_cache import compiled
from experts.wire import local_stream
from experts.wire._numba import sockets
from experts.wire._numba.add_answers import LATE, OTHER, SUMMED, compile_add_answers
from experts.wire.codec import encode_failure, encode_partial
from experts.wire.lane import Lane

WAIT_S = 30.0
TOKENS, HIDDEN = 5, 24
CALL_ID = 77
PORTS = itertools.count(os.getpid() % 40000 + 1024)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")


class Peer:
    """A group by hand, at the other end of a lane."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{next(PORTS)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0expertmesh " + self.address.replace(":", " "))
        self._listener.listen()
        self._listener.settimeout(WAIT_S)
        self.connected: socket.socket | None = None

    def accept(self) -> None:
        self.connected, _ = self._listener.accept()
        self.connected.settimeout(WAIT_S)

    def write(self, data: bytes) -> None:
        assert self.connected is not None
        self.connected.sendall(data)

    def close(self) -> None:
        self._listener.close()
        if self.connected is not None:
            self.connected.close()


class Sum:
    """The answers of a lane's peers, and their sum so far."""

    def __init__(self, lane: Lane, tokens: list[list[int] | None]) -> None:
        self._lane = lane
        # A group without rows among them, as there may be.
        shares = [(3, 1, 0 if each is None else len(each)) for each in tokens]
        self._shares_G3 = np.array([*shares, *[(0, 0, 0)] * (len(lane.sockets_G) - len(shares))])
        self._tokens = np.array([token for each in tokens for token in each or ()], np.int32)
        self._progress = np.zeros(2, np.int64)
        self._received = np.empty(TOKENS * HIDDEN * 4 + 128, np.uint8)
        self.out_TH = torch.full((TOKENS, HIDDEN), float("nan"))

    def add(self, wait_s: float = WAIT_S) -> int:
        return compile_add_answers()(
            *(self._lane.sockets_G, CALL_ID, self._shares_G3, self._tokens, self._progress, int(1e3 * wait_s)),
            *(self._received, np.empty(TOKENS * HIDDEN, np.float32), self.out_TH.numpy()),
        )


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made = [Peer() for _ in range(3)]
    yield made
    for peer in made:
        peer.close()


@pytest.fixture
def lane(peers: list[Peer]) -> Iterator[Lane]:
    lane = Lane.to([peer.address for peer in peers])
    assert lane is not None
    for peer in peers:
        peer.accept()
    yield lane
    lane.close()


def rows(seed: int, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def answer(partial_TH: torch.Tensor, call_id: int = CALL_ID) -> bytes:
    return framed(encode_partial(call_id, partial_TH, torch.float32))


def framed(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


@pytest.mark.parametrize(
    "tokens", [[None, None, None], [[0, 2], None, [1, 2, 4]], [[3], [0, 3, 4], [1]], [None], [[1, 4]], []], ids=str
)
def test_the_sum_is_what_adding_one_after_the_other_gives(
    peers: list[Peer], lane: Lane, tokens: list[list[int] | None]
) -> None:
    for _ in range(3):  # again and again over the same sockets
        sum_, expected = Sum(lane, tokens), torch.zeros(TOKENS, HIDDEN)
        for seed, (peer, chosen) in enumerate(zip(peers, tokens, strict=False)):
            partial_TH = rows(seed, TOKENS if chosen is None else len(chosen))
            peer.write(answer(partial_TH))
            expected[slice(None) if chosen is None else chosen] += partial_TH
        assert sum_.add() == SUMMED
        assert torch.equal(sum_.out_TH, expected)


def test_an_answer_in_pieces(peers: list[Peer], lane: Lane) -> None:
    message, sum_ = answer(rows(0)), Sum(lane, [None])
    peers[0].write(message[:2])
    rest = threading.Thread(target=lambda: [peers[0].write(bytes([byte])) for byte in message[2:]])
    rest.start()
    assert sum_.add() == SUMMED
    rest.join()
    assert torch.equal(sum_.out_TH, rows(0))


@pytest.mark.parametrize("written", [0, 2, 100])
def test_what_is_late_can_be_waited_for_again(peers: list[Peer], lane: Lane, written: int) -> None:
    sum_, message = Sum(lane, [None, [2], None]), answer(rows(1, 1))
    peers[0].write(answer(rows(0)))
    peers[1].write(message[:written])
    peers[2].write(answer(rows(2)))
    assert sum_.add(0.01) == LATE
    assert sum_.add(0.0) == LATE
    peers[1].write(message[written:])
    assert sum_.add() == SUMMED
    expected = rows(0).clone()
    expected[2] += rows(1, 1)[0]
    assert torch.equal(sum_.out_TH, expected + rows(2))


@pytest.mark.parametrize(
    "message",
    [
        framed(encode_failure(CALL_ID, ExpertNotResident("gone"))),
        answer(rows(0), CALL_ID + 1),
        answer(rows(0)) * 2,
        answer(rows(0, TOKENS - 1)),
        answer(rows(0)[:, 1:]),
        answer(torch.ones(TOKENS, HIDDEN * 4)),
        struct.pack("<I", 1 << 31) + bytes(1000),
        framed(b"no message"),
        framed(b""),
    ],
    ids=("refusal", "another", "two", "few", "narrow", "too-long", "endless", "nonsense", "nothing"),
)
def test_what_is_no_ordinary_answer_is_not_added(peers: list[Peer], lane: Lane, message: bytes) -> None:
    sum_ = Sum(lane, [None, None])
    peers[0].write(message)
    peers[1].write(answer(rows(1)))
    assert sum_.add() == OTHER
    assert not sum_.out_TH.any()


@pytest.mark.parametrize("written", [0, 100])
def test_a_peer_that_goes_away(peers: list[Peer], lane: Lane, written: int) -> None:
    peers[0].write(answer(rows(0))[:written])
    peers[0].close()
    assert Sum(lane, [None]).add() == OTHER


def send(number: int, framed: np.ndarray, size: int) -> bool:
    def send_(socket_, framed_, size_):
        return sockets.send_framed(socket_, framed_, size_)

    return compiled(send_, "boolean(int64, uint8[::1], int64)", variant=())(number, framed, size)


def test_a_message_goes_out_with_its_length_or_not_at_all(peers: list[Peer], lane: Lane) -> None:
    framed_ = np.arange(5000, dtype=np.int64).astype(np.uint8)
    assert send(lane.sockets_G[1], framed_, 300)
    assert peers[1].connected is not None
    assert peers[1].connected.recv(5000) == struct.pack("<I", 300) + framed_[4:304].tobytes()
    # Nobody reads: what does not fit is refused rather than waited for.
    while send(lane.sockets_G[1], framed_, 4000):
        pass
    peers[2].close()
    assert not send(lane.sockets_G[2], framed_, 300)  # and no signal ends us


def test_a_lane_leads_to_all_of_its_peers_or_there_is_none(peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    connect = local_stream.connect
    monkeypatch.setattr("experts.wire.lane.connect", lambda address: opened.append(connect(address)) or opened[-1])
    assert Lane.to([peers[0].address, f"127.0.0.1:{next(PORTS)}"]) is None
    assert opened[0].fileno() == -1
    assert opened[1] is None
