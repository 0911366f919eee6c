"""A stream against grpcio's own server: sizes, threads, and every way that it can end."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import pytest

from experts.wire.grpc_stream import (
    _ACK,
    _DATA,
    _INITIAL_WINDOW_SIZE,
    _MAX_FRAME_SIZE,
    _SETTINGS,
    _WINDOW_UPDATE,
    GrpcStream,
    _frame,
)
from experts.wire.message_stream import StreamClosed

LIMIT = 64 << 20
Handler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


@contextmanager
def serving(handler: Handler, **options: int) -> Iterator[tuple[grpc.Server, str]]:
    limits = {"grpc.max_receive_message_length": LIMIT, "grpc.max_send_message_length": LIMIT, "grpc.so_reuseport": 0}
    arguments = [*limits.items(), *((f"grpc.{name}", value) for name, value in options.items())]
    server = grpc.server(ThreadPoolExecutor(4), options=arguments)
    method = grpc.stream_stream_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Stream": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


class Client:
    """A stream whose messages begin with a number, by which they are told apart."""

    def __init__(self, address: str, method: str = "/test.Echo/Stream", limit: int = LIMIT) -> None:
        self.arrived: dict[int, bytes] = {}
        self.stream = GrpcStream(address, method, self._receive, max_message_bytes=limit)

    def _receive(self, message: bytes) -> None:
        self.arrived[int.from_bytes(message[:4], "big")] = message[4:]

    def send(self, number: int, content: bytes = b"") -> None:
        self.stream.send(number.to_bytes(4, "big") + content)

    def receive(self, number: int, timeout_s: float | None = 30.0) -> bytes:
        self.stream.read_until(lambda: number in self.arrived, timeout_s)
        return self.arrived.pop(number)


@pytest.mark.parametrize("window", [65_535, 1 << 22])
@pytest.mark.parametrize("size", [0, 1, 16_380, 100_000, 20_000_000])
def test_messages_come_back_whatever_their_size(size: int, window: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    with serving(echo, **{"http2.lookahead_bytes": window, "http2.bdp_probe": 0}) as (_, address):
        client = Client(address)
        for number in range(3):
            client.send(number, content[:size])
            assert client.receive(number) == content[:size]
        client.stream.close("done")


def test_small_frames_both_ways() -> None:
    with serving(echo, **{"http2.max_frame_size": 16_384}) as (_, address):
        client = Client(address)
        client.send(1, b"x" * 300_000)
        assert client.receive(1) == b"x" * 300_000


def test_many_threads_share_a_stream() -> None:
    with serving(echo) as (_, address), ThreadPoolExecutor(16) as threads:
        client = Client(address)

        def call(number: int) -> bool:
            content = str(number).encode() * (number % 7 * 20_000)
            client.send(number, content)
            return client.receive(number) == content

        assert all(threads.map(call, range(400)))
        assert client.stream.is_open


def test_answers_out_of_order_reach_who_waits_for_them() -> None:
    def reverse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        held = [next(requests) for _ in range(8)]
        yield from reversed(held)

    with serving(reverse) as (_, address), ThreadPoolExecutor(8) as threads:
        client = Client(address)
        for number in range(8):
            client.send(number, bytes([number]))
        assert list(threads.map(client.receive, range(8))) == [bytes([number]) for number in range(8)]


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(StreamClosed, match=r"UNAVAILABLE: .*refused"):
            Client(f"127.0.0.1:{unused.getsockname()[1]}")


def test_an_unknown_method_is_named_by_its_status() -> None:
    with serving(echo) as (_, address):
        client = Client(address, "/test.Echo/Nothing")
        with pytest.raises(StreamClosed, match="UNIMPLEMENTED: Method not found"):
            client.receive(1)
        assert not client.stream.is_open


def test_an_abort_says_why() -> None:
    def abort(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "voll: 100% \u00fc")
        yield b""

    with serving(abort) as (_, address):
        client = Client(address)
        client.send(1)
        with pytest.raises(StreamClosed, match="RESOURCE_EXHAUSTED: voll: 100% \u00fc"):
            client.receive(1)
        with pytest.raises(StreamClosed, match="RESOURCE_EXHAUSTED"):
            client.send(2)


def test_messages_before_the_end_are_delivered() -> None:
    def once(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield next(requests)

    with serving(once) as (_, address):
        client = Client(address)
        client.send(1, b"last")
        assert client.receive(1) == b"last"
        with pytest.raises(StreamClosed, match="closed by the peer"):
            client.receive(2)


def test_a_server_that_stops_wakes_all_who_wait() -> None:
    came = threading.Semaphore(0)

    def never(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            came.release()
        yield b""

    with serving(never) as (server, address), ThreadPoolExecutor(3) as threads:
        client = Client(address)
        for number in range(3):
            client.send(number)
        waiting = [threads.submit(client.receive, number) for number in range(3)]
        for _ in range(3):
            assert came.acquire(timeout=30)
        server.stop(None)
        for each in waiting:
            with pytest.raises(StreamClosed, match=r"CANCELLED|UNAVAILABLE"):
                each.result(30)


def test_an_idle_stream_notices_that_its_server_is_gone() -> None:
    with serving(echo) as (_, address):
        client = Client(address)
        client.send(1)
        client.receive(1)
        assert client.stream.is_open
    assert not client.stream.is_open
    with pytest.raises(StreamClosed):
        client.send(2)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_late_reply_ends_the_stream(readers: int) -> None:
    with serving(lambda requests, context: iter(lambda: next(requests) and b"\0\0\0\x09", None)) as (_, address):
        client = Client(address)
        with ThreadPoolExecutor(readers) as threads:
            waiting = [threads.submit(client.receive, number, 0.2) for number in range(readers)]
            for each in waiting:
                with pytest.raises(StreamClosed, match="no reply in time"):
                    each.result(30)
        assert not client.stream.is_open


def test_close_wakes_the_reader() -> None:
    with serving(echo) as (_, address), ThreadPoolExecutor(1) as threads:
        client = Client(address)
        waiting = threads.submit(client.receive, 1)
        client.stream.close("the replica left")
        with pytest.raises(StreamClosed, match="the replica left"):
            waiting.result(30)


def test_a_message_above_the_limit_is_refused() -> None:
    with serving(echo) as (_, address):
        client = Client(address, limit=1000)
        client.send(1, b"x" * 2000)
        with pytest.raises(StreamClosed, match="RESOURCE_EXHAUSTED"):
            client.receive(1)


def test_what_is_no_http2_ends_the_stream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(f"127.0.0.1:{listener.getsockname()[1]}")
        peer, _ = listener.accept()
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3)
        peer.close()
        with pytest.raises(StreamClosed):
            client.receive(1)


def test_no_frame_is_larger_than_the_settings_acknowledged_before_it() -> None:
    """A peer's settings hold for what comes after our acknowledgement, whichever thread writes it."""
    sizes = [2**14, *([2**15, 2**14] * 100)]
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as sender:
        client = Client(f"127.0.0.1:{listener.getsockname()[1]}")
        peer, _ = listener.accept()
        peer.settimeout(30)
        with peer, peer.makefile("rb") as written:
            written.read(24)  # the preface
            peer.sendall(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))
            peer.sendall(_frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, 2**31 - 1)))
            reader = threading.Thread(target=suppressed, args=(lambda: client.stream.read_until(lambda: False),))
            reader.start()
            sending = sender.submit(lambda: suppressed(lambda: [client.send(0, bytes(2**20)) for _ in range(500)]))
            acknowledged = largest = 0
            while acknowledged < len(sizes):
                head = written.read(9)
                size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                written.read(size)
                if kind == _DATA:
                    assert size <= sizes[max(0, acknowledged - 1)]
                    largest = max(largest, size)
                elif kind == _SETTINGS and flags & _ACK:
                    acknowledged += 1
                    if acknowledged < len(sizes):
                        peer.sendall(_frame(_SETTINGS, 0, 0, struct.pack(">HI", _MAX_FRAME_SIZE, sizes[acknowledged])))
            assert largest > 2**14
        client.stream.close("done")
        reader.join(30)
        sending.result(30)


def suppressed(work: Callable[[], object]) -> None:
    with suppress(StreamClosed):
        work()


def test_pings_are_answered_while_somebody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, ready = threading.Semaphore(0), threading.Event()
    write = GrpcStream._write

    def counted(stream: GrpcStream, *pieces: bytes) -> None:
        write(stream, *pieces)
        if pieces[0][3:5] == b"\x06\x01":  # PING, ACK
            answered.release()

    def slow(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        request = next(requests)
        ready.wait(30)
        yield request

    monkeypatch.setattr(GrpcStream, "_write", counted)
    options = {"keepalive_time_ms": 100, "keepalive_timeout_ms": 5000, "http2.max_pings_without_data": 0}
    with serving(slow, **options) as (_, address), ThreadPoolExecutor(1) as threads:
        client = Client(address)
        client.send(1, b"x")
        waiting = threads.submit(client.receive, 1)
        for _ in range(3):
            assert answered.acquire(timeout=30)
        ready.set()
        assert waiting.result(30) == b"x"
