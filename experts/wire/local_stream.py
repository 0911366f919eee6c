"""Messages between processes of one machine: a Unix socket, and before each message its length.

Between machines a message goes through HTTP/2 and grpcio's server, which wakes two threads for it. Here the peer's
thread that reads is the one that computes and answers. The messages are those of ExpertService's `Stream`.

The socket is in Linux's abstract namespace, under the address that the peer's gRPC server has: whoever sees the one
sees the other, and nothing is left behind. Neither end talks to another user's process.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from experts.wire.message_stream import SEND_TIMEOUT_S, MessageStream

_LENGTH = struct.Struct("<I")
# Bytes of messages without an answer up to which writing cannot block; the kernel keeps more, its own notes included.
BUFFERED_BYTES = 128 * 1024
_NOTES_BYTES = 1024
_WILDCARDS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
_MAX_WAITING = 128
_CONNECT_TIMEOUT_S = 1.0


def connect(address: str) -> socket.socket | None:
    """A socket to the server at `address` (host:port); None where it is not on this machine, or not ours.

    Before each message, either way, goes its length in four bytes, little-endian; it takes messages of BUFFERED_BYTES
    that are not answered yet without waiting.
    """
    for name in _names(address, wildcard=True):
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(_CONNECT_TIMEOUT_S)
        try:
            connected.connect(name)
            if _is_ours(connected):
                connected.settimeout(None)
                return _with_room(connected)
        except OSError:
            pass
        connected.close()
    return None


class LocalStream(MessageStream):
    """The caller's end. The peer answers each message with one."""

    def __init__(self, connected: socket.socket, receive: Callable[[bytes], None]) -> None:
        super().__init__(connected, receive)
        self._unanswered: deque[int] = deque()
        self._unanswered_bytes = 0

    @classmethod
    def to(cls, address: str, receive: Callable[[bytes], None]) -> LocalStream | None:
        """A stream to the server at `address` (host:port); None where it is not on this machine, or not ours."""
        connected = connect(address)
        return None if connected is None else cls(connected, receive)

    def send(self, message: bytes) -> None:
        size, framed = len(message) + _NOTES_BYTES, _LENGTH.pack(len(message)) + message
        with self._one_message:
            # A peer that waits for us to take its answer reads nothing.
            if self._unanswered_bytes + size > BUFFERED_BYTES:
                self.read_until(
                    lambda: not self._unanswered or self._unanswered_bytes + size <= BUFFERED_BYTES, SEND_TIMEOUT_S
                )
            with self._changed:
                self._unanswered.append(size)
                self._unanswered_bytes += size
            self._send_all(framed)

    def _take(self) -> None:
        message = self._message()
        with self._changed:
            self._unanswered_bytes -= self._unanswered.popleft()
        self._receive(message)

    def _message(self) -> bytes:
        if not self._input:
            # Most arrive whole, and alone.
            received = self._receive_some()
            if len(received) >= _LENGTH.size and _LENGTH.unpack_from(received)[0] == len(received) - _LENGTH.size:
                return received[_LENGTH.size :]
            self._input += received
        (size,) = _LENGTH.unpack(self._bytes(_LENGTH.size))
        return bytes(self._bytes(size))


class LocalServer:
    """Serves the streams of this machine's callers to the gRPC server at `address`, a thread each.

    serve: a stream's requests to its answers, one each; resumed for the next when the answer is out
    max_message_bytes: a longer request ends its stream
    """

    def __init__(
        self, address: str, serve: Callable[[Iterator[bytes]], Iterable[bytes]], *, max_message_bytes: int
    ) -> None:
        self._serve = serve
        self._max_message_bytes = max_message_bytes
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        for name in _names(address, wildcard=False):
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.bind(name)
            except OSError:  # callers then come over TCP
                listener.close()
                continue
            listener.listen(_MAX_WAITING)
            self._listener = listener

    def start(self) -> None:
        """Begin to answer."""
        if self._listener is not None:
            self._accepting = threading.Thread(
                target=self._accept, args=(self._listener,), name="local-streams", daemon=True
            )
            self._accepting.start()

    def stop(self) -> None:
        """Close every stream."""
        with self._lock:
            listener, self._listener = self._listener, None
            connections = [*self._open, *([listener] if listener else [])]
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()
        if self._accepting is not None:
            self._accepting.join()  # the name is taken for as long as it waits

    def _accept(self, listener: socket.socket) -> None:
        # Once nobody accepts, nobody listens: callers then come over TCP.
        with listener, suppress(OSError, RuntimeError):  # stopped, or no file or thread is left
            while True:
                connected, _ = listener.accept()
                with self._lock:
                    welcome = self._listener is not None and _is_ours(connected)
                    if welcome:
                        self._open.add(connected)
                if not welcome:
                    connected.close()
                    continue
                try:
                    threading.Thread(target=self._answer, args=(connected,), name="local-stream", daemon=True).start()
                except RuntimeError:
                    self._open.discard(connected)
                    connected.close()
                    raise

    def _answer(self, connected: socket.socket) -> None:
        try:
            with connected, suppress(OSError):
                _with_room(connected)
                for answer in self._serve(_messages(connected, self._max_message_bytes)):
                    connected.sendall(_LENGTH.pack(len(answer)) + answer)
        finally:
            with self._lock:
                self._open.discard(connected)


def _with_room(connected: socket.socket) -> socket.socket:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * BUFFERED_BYTES)
    return connected


def _messages(connected: socket.socket, max_message_bytes: int) -> Iterator[bytes]:
    with connected.makefile("rb") as stream:
        while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
            (size,) = _LENGTH.unpack(head)
            if size > max_message_bytes:
                return
            message = stream.read(size)
            if len(message) < size:
                return
            yield message


def _names(address: str, *, wildcard: bool) -> list[str]:
    """Names of the server at `address`; with `wildcard`, also of the one that listens at every address of its port."""
    if sys.platform != "linux":
        return []
    host, _, port = address.rpartition(":")
    try:
        family, _, _, _, found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except OSError:
        return []
    hosts = [str(found[0]), *([_WILDCARDS[family]] if wildcard and family in _WILDCARDS else [])]
    return [f"\0expertmesh {each} {port}" for each in hosts]


def _is_ours(connected: socket.socket) -> bool:
    """Whether this user's process is at the other end."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.geteuid())
