"""Sums read from the sockets themselves: an answer in them is nowhere else, and one that is not is not lost."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from experts.errors import ExpertNotResident, RequestError
from experts.spec import ExpertCall
from experts.wire.client import CallFailed, ExpertClient, StreamReply
from experts.wire.codec import encode_failure, encode_partial
from experts.wire.sum_answers import sum_answers

WAIT_S = 30.0
TOKENS, HIDDEN = 5, 24
PORTS = itertools.count(os.getpid() % 40000 + 1024)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")


class Peer:
    """A group by hand: takes calls of `client` and writes the bytes that a test wants."""

    def __init__(self, client: ExpertClient) -> None:
        self.address = f"127.0.0.1:{next(PORTS)}"
        self._client = client
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0expertmesh " + self.address.replace(":", " "))
        self._listener.listen()
        self._listener.settimeout(WAIT_S)
        self._connected: socket.socket | None = None

    def ask(self) -> StreamReply:
        call = ExpertCall(
            layer=0,
            hidden_TH=torch.ones(TOKENS, HIDDEN),
            expert_ids_S=torch.zeros(1, dtype=torch.int32),
            offsets_S1=torch.tensor([0, TOKENS], dtype=torch.int32),
            token_rows_R=torch.arange(TOKENS, dtype=torch.int32),
            weights_R=torch.ones(TOKENS),
        )
        reply = self._client.send(self.address, self.address, call)
        assert isinstance(reply, StreamReply)
        return reply

    def write(self, data: bytes) -> None:
        if self._connected is None:
            self._connected, _ = self._listener.accept()
        self._connected.sendall(data)

    def close(self) -> None:
        self._listener.close()
        if self._connected is not None:
            self._connected.close()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    client = ExpertClient()
    made = [Peer(client) for _ in range(3)]
    yield made
    client.close()
    for peer in made:
        peer.close()


def rows(seed: int, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def answer(reply: StreamReply, partial_TH: torch.Tensor) -> bytes:
    return framed(encode_partial(reply.call_id, partial_TH, torch.float32))


def framed(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


def sum_of(replies: list[StreamReply], tokens: list[list[int] | None], timeout_s: float = WAIT_S):
    out_TH = torch.zeros(TOKENS, HIDDEN)
    chosen = [None if each is None else np.array(each, np.int32) for each in tokens]
    return sum_answers(replies, chosen, timeout_s, out_TH), out_TH


@pytest.mark.parametrize(
    "tokens", [[None, None, None], [[0, 2], None, [1, 2, 4]], [[3], [0, 3, 4], [1]], [None], [[1, 4]]], ids=str
)
def test_the_sum_is_what_adding_one_after_the_other_gives(peers: list[Peer], tokens: list[list[int] | None]) -> None:
    replies, expected = [], torch.zeros(TOKENS, HIDDEN)
    for seed, (peer, chosen) in enumerate(zip(peers, tokens, strict=False)):
        partial_TH = rows(seed, TOKENS if chosen is None else len(chosen))
        replies.append(peer.ask())
        peer.write(answer(replies[-1], partial_TH))
        expected[slice(None) if chosen is None else chosen] += partial_TH
    count, out_TH = sum_of(replies, tokens)
    assert count == len(tokens)
    assert torch.equal(out_TH, expected)


def test_again_and_again_over_the_same_streams(peers: list[Peer]) -> None:
    for seed in range(20):
        replies = [peer.ask() for peer in peers]
        for peer, reply in zip(peers, replies, strict=True):
            peer.write(answer(reply, rows(seed)))
        assert sum_of(replies, [None] * 3)[0] == 3
    reply = peers[0].ask()
    peers[0].write(answer(reply, rows(7)))
    assert torch.equal(reply.result(WAIT_S), rows(7))


def test_an_answer_in_pieces(peers: list[Peer]) -> None:
    reply = peers[0].ask()
    message = answer(reply, rows(0))
    peers[0].write(message[:2])
    rest = threading.Thread(target=lambda: [peers[0].write(bytes([byte])) for byte in message[2:]])
    rest.start()
    count, out_TH = sum_of([reply], [None])
    rest.join()
    assert count == 1
    assert torch.equal(out_TH, rows(0))


@pytest.mark.parametrize(
    ("failure", "raised"), [(ExpertNotResident("gone"), ExpertNotResident), (RequestError("no"), RequestError)]
)
def test_a_refusal_is_left_to_its_reply(peers: list[Peer], failure: Exception, raised: type[Exception]) -> None:
    replies = [peer.ask() for peer in peers]
    peers[0].write(answer(replies[0], rows(0)))
    peers[1].write(framed(encode_failure(replies[1].call_id, failure)))
    peers[2].write(answer(replies[2], rows(2)))
    count, out_TH = sum_of(replies, [None] * 3)
    assert count == 1
    assert torch.equal(out_TH, rows(0))
    with pytest.raises(raised):
        replies[1].result(WAIT_S)
    assert torch.equal(replies[2].result(WAIT_S), rows(2))


def test_another_calls_answer_goes_to_its_caller(peers: list[Peer]) -> None:
    before, reply = peers[0].ask(), peers[0].ask()
    peers[0].write(answer(before, rows(1)) + answer(reply, rows(2)))
    assert sum_of([reply], [None])[0] == 0
    assert torch.equal(reply.result(WAIT_S), rows(2))
    assert torch.equal(before.result(WAIT_S), rows(1))


def test_an_answer_that_is_here_already(peers: list[Peer]) -> None:
    before, reply = peers[0].ask(), peers[0].ask()
    peers[0].write(answer(before, rows(1)) + answer(reply, rows(2)))
    assert torch.equal(reply.result(WAIT_S), rows(2))  # reads both
    assert sum_of([before], [None])[0] == 0
    assert torch.equal(before.result(WAIT_S), rows(1))


@pytest.mark.parametrize("written", [0, 2, 100])
def test_what_does_not_come_in_time_can_come_later(peers: list[Peer], written: int) -> None:
    replies = [peers[0].ask(), peers[1].ask()]
    message = answer(replies[0], rows(0))
    peers[0].write(message[:written])
    assert sum_of(replies, [None, None], timeout_s=0.01)[0] == 0
    peers[0].write(message[written:])
    peers[1].write(answer(replies[1], rows(1)))
    assert torch.equal(replies[0].result(WAIT_S), rows(0))
    assert torch.equal(replies[1].result(WAIT_S), rows(1))


@pytest.mark.parametrize("written", [0, 100])
def test_a_peer_that_goes_away(peers: list[Peer], written: int) -> None:
    reply = peers[0].ask()
    peers[0].write(answer(reply, rows(0))[:written])
    peers[0].close()
    assert sum_of([reply], [None])[0] == 0
    with pytest.raises(CallFailed):
        reply.result(WAIT_S)


@pytest.mark.parametrize(
    "partial_TH",
    [rows(0, TOKENS + 1), rows(0, TOKENS - 1), torch.ones(1, 4000), rows(0)[:, 1:]],
    ids=lambda rows: str(tuple(rows.shape)),
)
def test_an_answer_of_another_shape_is_left_to_its_reply(peers: list[Peer], partial_TH: torch.Tensor) -> None:
    reply = peers[0].ask()
    peers[0].write(answer(reply, partial_TH))
    assert sum_of([reply], [None])[0] == 0
    assert torch.equal(reply.result(WAIT_S), partial_TH)


def test_nobody_reads_where_another_thread_does(peers: list[Peer]) -> None:
    first, second = peers[0].ask(), peers[0].ask()
    got: list[torch.Tensor] = []
    reader = threading.Thread(target=lambda: got.append(first.result(WAIT_S)))
    reader.start()
    until = time.monotonic() + WAIT_S
    while second.claim() >= 0:  # until the other one reads
        second.release(answered=False)
        assert time.monotonic() < until, "the other thread never read"
    assert sum_of([second], [None])[0] == 0
    peers[0].write(answer(first, rows(1)) + answer(second, rows(2)))
    reader.join(WAIT_S)
    assert torch.equal(got[0], rows(1))
    assert torch.equal(second.result(WAIT_S), rows(2))


def test_a_reply_that_comes_over_no_stream_is_none_of_it(peers: list[Peer]) -> None:
    class Other:
        def result(self, timeout_s: float | None = None) -> torch.Tensor:
            return rows(0)

        def cancel(self) -> None: ...

    reply = peers[0].ask()
    peers[0].write(answer(reply, rows(1)))
    assert sum_answers([Other(), reply], [None, None], WAIT_S, torch.zeros(TOKENS, HIDDEN)) == 0
    assert torch.equal(reply.result(WAIT_S), rows(1))
