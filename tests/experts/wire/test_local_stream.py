from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from experts.group import ExpertGroup
from experts.server import ExpertServer
from experts.spec import ExpertCall
from experts.wire import local_stream, message_stream
from experts.wire.client import ExpertClient
from experts.wire.local_stream import LocalServer, LocalStream
from experts.wire.message_stream import StreamClosed

WAIT_S = 30.0
LIMIT = 1 << 23
pytestmark = pytest.mark.skipif(local_stream.sys.platform != "linux", reason="abstract sockets are Linux's")


class Caller:
    """A stream whose answers arrive in `answers`."""

    def __init__(self, address: str) -> None:
        self.answers: list[bytes] = []
        stream = LocalStream.to(address, self.answers.append)
        assert stream is not None
        self.stream = stream

    def wait(self, count: int) -> list[bytes]:
        self.stream.read_until(lambda: len(self.answers) >= count, WAIT_S)
        return self.answers


def echo(requests: Iterator[bytes]) -> Iterable[bytes]:
    return requests


Start = Callable[..., LocalServer]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[LocalServer] = []

    def begin(address: str, serve: Callable[[Iterator[bytes]], Iterable[bytes]] = echo) -> LocalServer:
        servers.append(LocalServer(address, serve, max_message_bytes=LIMIT))
        servers[-1].start()
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


# Another run of the suite on this machine has another number.
PORT = os.getpid() % 60000 + 1024


@pytest.fixture
def address() -> str:
    """Nobody listens there with TCP."""
    return f"127.0.0.1:{PORT}"


@pytest.mark.parametrize("size", [0, 1, 5000, 3_000_000])
def test_messages_come_back_whole_and_in_order(start: Start, address: str, size: int) -> None:
    start(address)
    caller = Caller(address)
    messages = [bytes([number]) * size for number in range(20)]
    for message in messages:
        caller.stream.send(message)
    assert caller.wait(20) == messages


def test_many_threads_share_a_stream_whatever_their_messages_size(start: Start, address: str) -> None:
    """Nobody reads while all send, and the peer writes more than the kernel keeps."""
    start(address, lambda requests: (request * 50 for request in requests))
    caller = Caller(address)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller.stream.send, [bytes([number]) * 40_000 for number in range(200)]))
    assert sorted(caller.wait(200)) == [bytes([number]) * 2_000_000 for number in range(200)]


def test_callers_have_streams_of_their_own(start: Start, address: str) -> None:
    started = threading.Barrier(2)

    def meet(requests: Iterator[bytes]) -> Iterator[bytes]:
        for request in requests:
            started.wait(WAIT_S)  # both are being served at once
            yield request

    start(address, meet)
    first, second = Caller(address), Caller(address)
    first.stream.send(b"first")
    second.stream.send(b"second")
    assert (first.wait(1), second.wait(1)) == ([b"first"], [b"second"])


def test_only_the_server_at_the_address_is_found(start: Start) -> None:
    start(f"127.0.0.2:{PORT}")
    assert LocalStream.to(f"127.0.0.3:{PORT}", print) is None
    assert LocalStream.to(f"127.0.0.2:{PORT + 1}", print) is None
    assert LocalStream.to(f"nobody.invalid:{PORT}", print) is None
    Caller(f"127.0.0.2:{PORT}").stream.close("done")
    start(f"0.0.0.0:{PORT + 2}")
    Caller(f"127.0.0.2:{PORT + 2}").stream.close("done")


def test_another_users_processes_are_strangers(start: Start, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start(address)
    real, refused = os.geteuid(), threading.Event()

    def is_server() -> bool:
        return threading.current_thread().name == "local-streams"

    monkeypatch.setattr(local_stream.os, "geteuid", lambda: real if is_server() else real + 1)
    assert LocalStream.to(address, print) is None

    def user() -> int:
        if is_server():
            refused.set()
            return real + 1
        return real

    monkeypatch.setattr(local_stream.os, "geteuid", user)
    caller = Caller(address)
    assert refused.wait(WAIT_S)
    with pytest.raises(StreamClosed, match="UNAVAILABLE"):
        caller.wait(1)


def test_who_waits_hears_that_the_server_stopped(start: Start, address: str) -> None:
    got = threading.Event()

    def silent(requests: Iterator[bytes]) -> Iterator[bytes]:
        for _ in requests:
            got.set()
        yield from ()

    server = start(address, silent)
    caller = Caller(address)
    caller.stream.send(b"anybody?")
    assert got.wait(WAIT_S)
    assert caller.stream.is_open
    server.stop()
    with pytest.raises(StreamClosed, match="UNAVAILABLE"):
        caller.wait(1)
    assert not caller.stream.is_open
    with pytest.raises(StreamClosed):
        caller.stream.send(b"still there?")
    assert LocalStream.to(address, print) is None


def test_a_waiting_thread_is_told_of_every_answer(start: Start, address: str) -> None:
    """Two wait; the one that does not read has its answer while the other still waits."""
    last = threading.Event()

    def answer(requests: Iterator[bytes]) -> Iterator[bytes]:
        for request in requests:
            if request == b"last":
                assert last.wait(WAIT_S)
            yield request

    start(address, answer)
    caller = Caller(address)
    reading = threading.Event()

    def until_last() -> bool:
        reading.set()
        return b"last" in caller.answers

    with ThreadPoolExecutor(1) as pool:
        caller.stream.send(b"first")
        caller.stream.send(b"last")
        reader = pool.submit(caller.stream.read_until, until_last, WAIT_S)
        assert reading.wait(WAIT_S)
        caller.stream.read_until(lambda: b"first" in caller.answers, WAIT_S)
        assert not reader.done()
        last.set()
        reader.result(WAIT_S)


def test_an_answer_that_stops_in_the_middle_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    stream = LocalStream(ours, lambda _: None)
    with theirs:
        stream.send(b"?")
        theirs.sendall((1000).to_bytes(4, "little") + bytes(100))
        with pytest.raises(StreamClosed, match="no reply in time"):
            stream.read_until(lambda: False, 0.05)
        assert not stream.is_open


def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_stream, "SEND_TIMEOUT_S", 1.0)
    ours, theirs = socket.socketpair()
    stream = LocalStream(ours, lambda _: None)
    with theirs, pytest.raises(StreamClosed, match="the peer took nothing for 1 s"):
        stream.send(bytes(LIMIT))


def test_too_long_a_request_ends_its_stream(start: Start, address: str) -> None:
    start(address)
    caller = Caller(address)
    with contextlib.suppress(StreamClosed):  # where the server was quicker
        caller.stream.send(bytes(LIMIT + 1))
    with pytest.raises(StreamClosed, match="UNAVAILABLE"):
        caller.wait(1)


def test_a_server_that_cannot_serve_does_not_listen(
    start: Start, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers then come over TCP, where gRPC says what is wrong."""
    server = start(address)
    begin = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "local-stream":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    caller = Caller(address)
    with pytest.raises(StreamClosed, match="UNAVAILABLE"):
        caller.wait(1)
    assert server._accepting is not None
    server._accepting.join(WAIT_S)
    assert LocalStream.to(address, print) is None


def test_without_an_answer_in_time_the_stream_is_given_up(start: Start, address: str) -> None:
    silence = threading.Event()
    start(address, lambda requests: (request for request in requests if silence.wait(WAIT_S)))
    caller = Caller(address)
    caller.stream.send(b"well?")
    with pytest.raises(StreamClosed, match="no reply in time"):
        caller.stream.read_until(lambda: bool(caller.answers), 0.01)
    silence.set()


def test_a_second_server_of_the_address_leaves_the_callers_to_the_first(start: Start, address: str) -> None:
    start(address)
    start(address, lambda requests: (b"second" for _ in requests))
    caller = Caller(address)
    caller.stream.send(b"who?")
    assert caller.wait(1) == [b"who?"]


@pytest.mark.parametrize("local", [True, False])
def test_a_group_answers_the_same_over_either_socket(
    local: bool, server: ExpertServer, loaded_group: ExpertGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    find = LocalStream.to

    def to(address: str, receive: Callable[[bytes], None]) -> LocalStream | None:
        opened.append(find(address, receive) if local else None)
        return opened[-1]  # type: ignore[return-value]

    monkeypatch.setattr(LocalStream, "to", to)
    client = ExpertClient()
    call = ExpertCall(
        layer=1,
        hidden_TH=torch.randn(3, loaded_group.spec.hidden_size),
        expert_ids_S=torch.tensor([1, 4], dtype=torch.int32),
        offsets_S1=torch.tensor([0, 2, 3], dtype=torch.int32),
        token_rows_R=torch.tensor([0, 2, 1], dtype=torch.int32),
        weights_R=torch.rand(3),
    )
    torch.testing.assert_close(client.send("group", server.address, call).result(), loaded_group.forward(call))
    assert isinstance(opened[0], LocalStream) == local
    client.close()
