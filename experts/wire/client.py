"""Calls an expert group's ExpertService: one bidirectional stream per peer, opened at the first call.

A stream beats unary calls by half at any size that we send: no new HTTP/2 stream, no scheduling of a handler. The
thread that waits for a reply reads the stream itself, so that no thread has to wake another; when several wait, one
reads for all. A call with a time limit goes as an RPC of its own, so that gRPC carries its deadline and its
cancellation to the group. What is large stays in shared memory where the peer has an address of this machine; the
first such call finds out whether it sees the same /dev/shm.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import grpc
import torch

from experts.errors import ExpertNotResident, MeshError, RequestError, SegmentUnreachable
from experts.node_call import NodeCall
from experts.spec import ExpertCall
from experts.wire.codec import MAX_MESSAGE_BYTES, WireReply, decode_partial, encode_call, segment_bytes
from experts.wire.shared_memory import Segment, SegmentPool
from experts.wire.v1 import expert_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["ExpertService"].full_name
# Pings find a peer whose machine is gone (a closed socket tells by itself). Reconnects are quick: whoever holds the
# placement table, not the channel, decides for how long a peer is worth calling.
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
# From here on (both ways together), copying through shared memory costs less than through two sockets.
_SHARED_BYTES = 128 * 1024
# How often overdue replies are looked for; a reply is given up at most so long after its deadline.
_WATCH_S = 0.2


class CallFailed(Exception):
    """No answer: connection lost or refused, deadline passed, or the group broke inside."""


class CallAbandoned(CallFailed):
    """The caller's own time limit passed, or it cancelled: nothing is said about the peer."""


class Reply(Protocol):
    """An answer that is on its way. Where nobody takes it, it is dropped when it arrives."""

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """Wait for partial_TH (float32). Raises CallFailed, or RequestError where the group refused the call."""
        ...

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        ...


class _Connection:
    """A channel and its stream. Dies with the stream's first error; the client then opens another."""

    def __init__(self, name: str, address: str) -> None:
        self._where = f"{name} at {address}" if name != address else address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._forward = self._channel.unary_unary(f"/{_SERVICE}/Forward")
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._call = self._channel.stream_stream(f"/{_SERVICE}/Stream")(iter(self._requests.get, None))
        self._changed = threading.Condition()
        self._reading = False
        self._wanted: set[int] = set()
        self._arrived: dict[int, WireReply] = {}
        self._deadlines: dict[int, float] = {}
        self._segments = SegmentPool()
        self._lent: dict[int, Segment] = {}
        self._same_machine = _is_own(address)
        self._error: CallFailed | None = None

    @property
    def alive(self) -> bool:
        return self._error is None and self._call.is_active()

    @property
    def held(self) -> int:
        return len(self._arrived)

    def segment(self, nbytes: int) -> Segment | None:
        """Shared memory for a call, or None where the call is small or the peer elsewhere."""
        return self._segments.take(nbytes) if self._same_machine and nbytes >= _SHARED_BYTES else None

    def not_shared(self) -> None:
        """The peer is on another machine after all."""
        self._same_machine = False

    def send(self, call_id: int, message: bytes, segment: Segment | None, resend: Callable[[], Reply]) -> Reply:
        self._wanted.add(call_id)
        if segment is not None:
            self._lent[call_id] = segment
        self._requests.put(message)
        return _StreamReply(self, call_id, resend)

    def request(self, message: bytes, timeout_s: float) -> Reply:
        return _UnaryReply(self._where, self._forward.future(message, timeout=timeout_s))

    def wait(self, call_id: int, timeout_s: float | None) -> WireReply:
        """The reply to `call_id`. Raises CallFailed once the stream is dead or the deadline has passed."""
        if timeout_s is not None:
            self._deadlines[call_id] = time.monotonic() + timeout_s
        try:
            return self._wait(call_id)
        finally:
            self._deadlines.pop(call_id, None)

    def _wait(self, call_id: int) -> WireReply:
        with self._changed:
            while True:
                if call_id in self._arrived:
                    return self._arrived.pop(call_id)
                if self._error is not None:
                    raise self._error
                if not self._reading:
                    self._reading = True
                    break
                self._changed.wait()
        try:
            return self._read_until(call_id)
        except grpc.RpcError as error:
            self.close(f"{error.code().name}: {error.details()}")
            raise self._dead() from error
        except StopIteration:
            self.close("the stream was closed by the group")
            raise self._dead() from None
        except RequestError as error:
            self.close(f"unreadable reply: {error}")
            raise self._dead() from error
        finally:
            with self._changed:
                self._reading = False
                self._changed.notify_all()

    def _read_until(self, call_id: int) -> WireReply:
        while True:
            reply = decode_partial(next(self._call), self._segments)
            if segment := self._lent.pop(reply.call_id, None):
                self._segments.give_back(segment)
            if reply.call_id == call_id:
                return reply
            with self._changed:
                if reply.call_id in self._wanted:
                    self._arrived[reply.call_id] = reply
                    self._changed.notify_all()

    def abandon(self, call_id: int) -> None:
        """Nobody waits for this reply any more."""
        self._wanted.discard(call_id)
        self._arrived.pop(call_id, None)

    def overdue(self, now: float) -> bool:
        return any(deadline < now for deadline in list(self._deadlines.values()))

    def close(self, reason: str) -> None:
        """Fail every reply that is owed; the first reason is the one that callers see."""
        with self._changed:
            if self._error is None:
                self._error = CallFailed(f"{self._where}: {reason}")
            self._changed.notify_all()
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()
        self._segments.close()

    def _dead(self) -> CallFailed:
        assert self._error is not None, "close() sets it"
        return self._error


class _StreamReply:
    def __init__(self, connection: _Connection, call_id: int, resend: Callable[[], Reply]) -> None:
        self._connection = connection
        self._call_id = call_id
        self._resend = resend

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        reply = self._connection.wait(self._call_id, timeout_s)
        if isinstance(reply.error, SegmentUnreachable):
            self._connection.not_shared()
            return self._resend().result(timeout_s)
        return _partial(reply)

    def cancel(self) -> None:
        self._connection.abandon(self._call_id)

    def __del__(self) -> None:
        self.cancel()


class _UnaryReply:
    def __init__(self, where: str, future: grpc.Future) -> None:
        self._where = where
        self._future = future

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        try:
            return _partial(decode_partial(self._future.result(timeout_s)))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise ExpertNotResident(error.details()) from error
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise RequestError(error.details()) from error
            kind = CallAbandoned if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else CallFailed
            raise kind(f"{self._where}: {error.code().name}: {error.details()}") from error
        except (grpc.FutureTimeoutError, grpc.FutureCancelledError) as error:
            self._future.cancel()
            raise CallAbandoned(f"{self._where}: no reply within the call's time limit") from error

    def cancel(self) -> None:
        self._future.cancel()


def _is_own(address: str) -> bool:
    """Whether `address` (host:port) is one of this machine's, as far as this process's network shows."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(found)
    except OSError:
        return False
    return True


def _partial(reply: WireReply) -> torch.Tensor:
    if isinstance(reply.error, RequestError):
        raise reply.error
    if isinstance(reply.error, MeshError):
        raise CallFailed(str(reply.error)) from reply.error
    assert reply.partial_TH is not None, "a reply holds an answer or an error"
    return reply.partial_TH


class ExpertClient:
    """Connections by name, each kept until it breaks or is dropped. Thread-safe.

    hidden_dtype: what hidden states travel in; None: their own (float8_e4m3fn: see `encode_frame`)
    reply_dtype:  what partial sums travel in; None: what the hidden states come in
    """

    def __init__(
        self, *, hidden_dtype: torch.dtype | None = None, reply_dtype: torch.dtype | None = torch.float32
    ) -> None:
        self._hidden_dtype = hidden_dtype
        self._reply_dtype = reply_dtype
        self._lock = threading.Lock()
        self._connections: dict[str, _Connection] = {}
        self._call_ids = itertools.count(1)
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="expert-deadlines", daemon=True)
        self._watcher.start()

    def send(self, name: str, address: str, call: ExpertCall | NodeCall, timeout_s: float | None = None) -> Reply:
        """Start a call to peer `name`, which listens at `address`. Raises CallFailed once the client is closed.

        timeout_s: bound of the whole call, which its deadline then carries to the group; None: no bound but the one
                   given to `Reply.result`
        """
        call_id = next(self._call_ids)
        hidden_dtype = self._hidden_dtype or call.hidden_TH.dtype
        reply_dtype = self._reply_dtype or call.hidden_TH.dtype
        connection = self._connection(name, address)
        segment = None
        if timeout_s is None:
            segment = connection.segment(segment_bytes(call.hidden_TH.numel(), hidden_dtype, reply_dtype))
        message = encode_call(call, call_id, hidden_dtype=hidden_dtype, reply_dtype=reply_dtype, segment=segment)
        if timeout_s is not None:
            return connection.request(message, timeout_s)
        return connection.send(call_id, message, segment, lambda: self.send(name, address, call))

    def drop(self, name: str, reason: str) -> None:
        """Close the connection to `name`; whatever it owes fails with `reason`."""
        with self._lock:
            connection = self._connections.pop(name, None)
        if connection is not None:
            connection.close(reason)

    def close(self) -> None:
        """Drop every connection."""
        self._closed.set()
        with self._lock:
            connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close("the client was closed")
        self._watcher.join()

    def replies_held(self) -> int:
        """Replies that arrived and wait to be taken."""
        return sum(connection.held for connection in list(self._connections.values()))

    def _connection(self, name: str, address: str) -> _Connection:
        connection = self._connections.get(name)
        if connection is not None and connection.alive:
            return connection
        with self._lock:
            if self._closed.is_set():
                raise CallFailed("the client was closed")
            connection = self._connections.get(name)
            if connection is None or not connection.alive:
                if connection is not None:
                    connection.close("the connection was lost")
                connection = self._connections[name] = _Connection(name, address)
            return connection

    def _watch(self) -> None:
        """End streams that owe a reply past its deadline: whoever waits is inside gRPC and cannot look itself."""
        while not self._closed.wait(_WATCH_S):
            now = time.monotonic()
            for connection in list(self._connections.values()):
                if connection.overdue(now):
                    connection.close("no reply within the deadline")
