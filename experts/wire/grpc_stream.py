"""One bidirectional gRPC stream over a TCP connection of its own, written and read by the threads that call.

grpcio's own client passes every message through threads of its own (one that takes it, one that polls, each woken more
than once), and waking those takes longer than the experts of a decode step. Here the calling thread writes to the
socket, and whoever waits reads from it. This is the client's half of HTTP/2 (RFC 9113) as far as a single gRPC stream
needs it (grpc/doc/PROTOCOL-HTTP2.md): headers once, messages in DATA frames, flow control, pings, and the trailers that
end it.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import cast
from urllib.parse import unquote

import grpc

from experts.wire.message_stream import SEND_TIMEOUT_S, MessageStream, StreamClosed

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_ACK = _END_STREAM = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 2, 4, 5
_STREAM = 1
_FRAME_HEAD = 9
_WINDOW, _LARGEST_WINDOW, _LARGEST_FRAME = 2**16 - 1, 2**31 - 1, 2**24 - 1
# Bytes received after which the peer may send as many again.
_ACKNOWLEDGED_BYTES = 2**30
_CONNECT_TIMEOUT_S = 5.0
# A machine that is gone answers no probe; of a process that is gone, the kernel closes the socket.
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 1, "TCP_USER_TIMEOUT": 15_000}
_CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


class GrpcStream(MessageStream):
    """A stream to `method` at `address` (host:port).

    Raises StreamClosed where nobody listens.
    """

    def __init__(self, address: str, method: str, receive: Callable[[bytes], None], *, max_message_bytes: int) -> None:
        # Servers, and machines whose groups are all in the engine's process, do without it.
        from hpack import Decoder, Encoder

        super().__init__(_connect(address), receive)
        self._max_message_bytes = max_message_bytes
        self._draining = False
        self._one_write = threading.Lock()
        # What the peer lets us send, on the connection and on the stream.
        self._windows = {0: _WINDOW, _STREAM: _WINDOW}
        self._initial_window = _WINDOW
        self._max_frame = 2**14
        self._received_bytes = 0
        self._partial = bytearray()
        self._header_block = bytearray()
        self._ends_stream = False
        self._decoder = Decoder()
        settings = ((_ENABLE_PUSH, 0), (_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW), (_MAX_FRAME_SIZE, _LARGEST_FRAME))
        headers = [
            *((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", address)),
            *(("content-type", "application/grpc"), ("te", "trailers")),
        ]
        self._write(
            _PREFACE,
            _frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings)),
            _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _WINDOW)),
            _frame(_HEADERS, _END_HEADERS, _STREAM, Encoder().encode(headers)),
        )

    @property
    def is_open(self) -> bool:
        return super().is_open and not self._draining

    def send(self, message: bytes) -> None:
        with self._one_message:
            left = memoryview(struct.pack(">BI", 0, len(message)) + message)
            while left:
                if min(self._windows.values()) <= 0:
                    self.read_until(lambda: min(self._windows.values()) > 0, SEND_TIMEOUT_S)
                # The peer's settings hold from our acknowledgement on, which must not come between this and the frame.
                with self._one_write:
                    with self._changed:
                        size = max(0, min(len(left), self._max_frame, *self._windows.values()))
                        for stream in self._windows:
                            self._windows[stream] -= size
                    if size:
                        self._send_all(_frame_head(_DATA, 0, _STREAM, size) + left[:size])
                left = left[size:]

    def _write(self, *pieces: bytes) -> None:
        with self._one_write:
            self._send_all(b"".join(pieces))

    def _take(self) -> None:
        head = self._bytes(_FRAME_HEAD)
        size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        stream = int.from_bytes(head[5:], "big") & _LARGEST_WINDOW
        content = self._bytes(size)
        if kind == _DATA:
            self._take_data(_without_padding(content, flags), size)
        elif kind in (_HEADERS, _CONTINUATION):
            if kind == _HEADERS:
                content = _without_padding(content, flags)[5 if flags & _PRIORITY else 0 :]
                self._ends_stream = bool(flags & _END_STREAM)
            self._header_block += content
            if flags & _END_HEADERS:
                self._take_headers()
        elif kind == _SETTINGS and not flags & _ACK:
            self._take_settings(content)
        elif kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, content))
        elif kind == _WINDOW_UPDATE:
            with self._changed:
                self._windows[stream] += int.from_bytes(content, "big") & _LARGEST_WINDOW
                self._changed.notify_all()
        elif kind == _GOAWAY:
            self._draining = True  # the peer answers what it has
            if code := int.from_bytes(content[4:8], "big"):
                raise StreamClosed(f"UNAVAILABLE: the peer ended the connection (HTTP/2 error {code})")
        elif kind == _RST_STREAM:
            raise StreamClosed(
                f"UNAVAILABLE: the peer reset the stream (HTTP/2 error {int.from_bytes(content, 'big')})"
            )

    def _take_data(self, content: bytearray, frame_bytes: int) -> None:
        self._received_bytes += frame_bytes
        if self._received_bytes >= _ACKNOWLEDGED_BYTES:
            more = struct.pack(">I", self._received_bytes)
            self._received_bytes = 0
            self._write(_frame(_WINDOW_UPDATE, 0, 0, more), _frame(_WINDOW_UPDATE, 0, _STREAM, more))
        self._partial += content
        while len(self._partial) >= 5:
            compressed, size = struct.unpack_from(">BI", self._partial)
            if compressed or size > self._max_message_bytes:
                raise StreamClosed(f"RESOURCE_EXHAUSTED: a message of {size} bytes, or one that is compressed")
            if len(self._partial) < 5 + size:
                return
            message = bytes(memoryview(self._partial)[5 : 5 + size])
            del self._partial[: 5 + size]
            self._receive(message)

    def _take_headers(self) -> None:
        headers = cast(dict[str, str], dict(self._decoder.decode(bytes(self._header_block))))
        self._header_block.clear()
        if headers.get(":status", "200") != "200":
            raise StreamClosed(f"UNAVAILABLE: the peer answered with HTTP status {headers[':status']}")
        if self._ends_stream:
            code = int(headers.get("grpc-status", 2))
            details = unquote(headers.get("grpc-message", ""))
            raise StreamClosed(f"{_CODES.get(code, code)}: {details}" if code else "the stream was closed by the peer")

    def _take_settings(self, content: bytearray) -> None:
        with self._one_write:
            with self._changed:
                for key, value in struct.iter_unpack(">HI", content):
                    if key == _INITIAL_WINDOW_SIZE:
                        self._windows[_STREAM] += value - self._initial_window
                        self._initial_window = value
                    elif key == _MAX_FRAME_SIZE:
                        self._max_frame = value
                self._changed.notify_all()
            self._send_all(_frame(_SETTINGS, _ACK, 0, b""))


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        connected = socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S)
    except OSError as error:
        raise StreamClosed(f"UNAVAILABLE: {error}") from error
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connected


def _frame_head(kind: int, flags: int, stream: int, size: int) -> bytes:
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream)


def _frame(kind: int, flags: int, stream: int, content: bytes | bytearray) -> bytes:
    return _frame_head(kind, flags, stream, len(content)) + content


def _without_padding(content: bytearray, flags: int) -> bytearray:
    return content[1 : len(content) - content[0]] if flags & _PADDED else content
