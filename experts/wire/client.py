"""Calls an expert group's ExpertService: one bidirectional stream per peer, opened at the first call.

The caller's thread writes, and the thread that waits for a reply reads (`experts.wire.message_stream`): over a Unix
socket where the peer is a process of this machine, over HTTP/2 elsewhere. A call with a time limit goes as an RPC of
its own, over grpcio, so that gRPC carries its deadline and its cancellation to the group. What is large stays in
shared memory where the peer has an address of this machine; the first such call finds out whether it sees the same
/dev/shm.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable
from typing import Protocol

import grpc
import torch

from experts.errors import ExpertNotResident, MeshError, RequestError, SegmentUnreachable
from experts.node_call import NodeCall
from experts.spec import ExpertCall
from experts.wire.canceller import Canceller
from experts.wire.codec import (
    MAX_MESSAGE_BYTES,
    WireReply,
    compiled_reader,
    compiled_writer,
    decode_partial,
    encode_call,
    segment_bytes,
)
from experts.wire.grpc_stream import GrpcStream
from experts.wire.local_stream import LocalStream
from experts.wire.message_stream import MessageStream, StreamClosed
from experts.wire.own_address import is_own
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
# From here on (both ways together), copying through shared memory costs less than through two sockets: printed by
# `expertmesh bench dispatch`.
SHARED_BYTES = 128 * 1024


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
    """A stream, and a channel for calls with a time limit. Dies with the stream; the client then opens another."""

    def __init__(self, name: str, address: str, shared_bytes: float) -> None:
        self._shared_bytes = shared_bytes
        self._where = f"{name} at {address}" if name != address else address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._forward = self._channel.unary_unary(f"/{_SERVICE}/Forward")
        self._canceller = Canceller(address)
        self._wanted: set[int] = set()
        self._arrived: dict[int, WireReply] = {}
        self._segments = SegmentPool()
        self._lent: dict[int, Segment] = {}
        self._same_machine = is_own(address)
        try:
            local = LocalStream.to(address, self._receive) if self._same_machine else None
            self._stream: MessageStream = local or GrpcStream(
                address, f"/{_SERVICE}/Stream", self._receive, max_message_bytes=MAX_MESSAGE_BYTES
            )
        except StreamClosed as error:
            self._channel.close()
            raise CallFailed(f"{self._where}: {error}") from error

    @property
    def alive(self) -> bool:
        return self._stream.is_open

    def segment(self, nbytes: int) -> Segment | None:
        """Shared memory for a call, or None where the call is small or the peer elsewhere."""
        return self._segments.take(nbytes) if self._same_machine and nbytes >= self._shared_bytes else None

    def give_back(self, segment: Segment) -> None:
        """No call uses it after all."""
        self._segments.give_back(segment)

    def not_shared(self) -> None:
        """The peer is on another machine after all."""
        self._same_machine = False

    def send(
        self,
        call_id: int,
        message: bytes,
        segment: Segment | None = None,
        resend: Callable[[], Reply] | None = None,
    ) -> Reply:
        """resend: asks again without shared memory, where there is a `segment`"""
        self._wanted.add(call_id)
        if segment is not None:
            self._lent[call_id] = segment
        try:
            self._stream.send(message)
        except StreamClosed as error:
            raise CallFailed(f"{self._where}: {error}") from error
        return _StreamReply(self, call_id, resend)

    def request(self, message: bytes, timeout_s: float) -> Reply:
        return _UnaryReply(self._where, self._forward.future(message, timeout=timeout_s))

    def wait(self, call_id: int, timeout_s: float | None) -> WireReply:
        """The reply to `call_id`. Raises CallFailed once the stream is dead or the time is over, CallAbandoned."""
        try:
            self._stream.read_until(lambda: call_id in self._arrived or call_id not in self._wanted, timeout_s)
        except StreamClosed as error:
            raise CallFailed(f"{self._where}: {error}") from error
        self._wanted.discard(call_id)
        reply = self._arrived.pop(call_id, None)
        if reply is None:
            raise CallAbandoned(f"{self._where}: cancelled by its caller")
        return reply

    def abandon(self, call_id: int) -> None:
        """Nobody waits for this reply any more."""
        self._wanted.discard(call_id)
        self._arrived.pop(call_id, None)

    def cancel(self, call_id: int) -> None:
        """Abandon it, and tell the peer, which may not have begun."""
        if call_id in self._wanted and call_id not in self._arrived:
            self._canceller.cancel(call_id)
        self.abandon(call_id)

    def close(self, reason: str) -> None:
        """Fail every reply that is owed; the first reason is the one that callers see."""
        self._stream.close(reason)
        self._channel.close()
        self._canceller.close()
        self._segments.close()

    def _receive(self, message: bytes) -> None:
        reply = decode_partial(message, self._segments)
        if segment := self._lent.pop(reply.call_id, None):
            self._segments.give_back(segment)
        if reply.call_id in self._wanted:
            self._arrived[reply.call_id] = reply


class _StreamReply:
    """A Reply that comes over a stream."""

    def __init__(self, connection: _Connection, call_id: int, resend: Callable[[], Reply] | None) -> None:
        self._call_id = call_id
        self._connection = connection
        self._resend = resend

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        reply = self._connection.wait(self._call_id, timeout_s)
        if isinstance(reply.error, SegmentUnreachable) and self._resend is not None:
            self._connection.not_shared()
            return self._resend().result(timeout_s)
        return _partial(reply)

    def cancel(self) -> None:
        self._connection.cancel(self._call_id)

    def __del__(self) -> None:
        # At whatever place that comes: nothing here may wait for a lock.
        self._connection.abandon(self._call_id)


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
        except grpc.FutureTimeoutError as error:
            self._future.cancel()
            raise CallFailed(f"{self._where}: no reply in time") from error
        except grpc.FutureCancelledError as error:
            raise CallAbandoned(f"{self._where}: cancelled by its caller") from error

    def cancel(self) -> None:
        self._future.cancel()


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
    shared_bytes: from how many bytes on, both ways together, payloads stay in shared memory; inf: never
    """

    def __init__(
        self,
        *,
        hidden_dtype: torch.dtype | None = None,
        reply_dtype: torch.dtype | None = torch.float32,
        shared_bytes: float = SHARED_BYTES,
    ) -> None:
        compiled_writer(), compiled_reader()  # now, rather than in the first call
        self._hidden_dtype = hidden_dtype
        self._reply_dtype = reply_dtype
        self._shared_bytes = shared_bytes
        self._lock = threading.Lock()
        self._connections: dict[str, _Connection] = {}
        # At random: a peer knows the calls of all its callers by them.
        self._call_ids = itertools.count(secrets.randbits(62))
        self._closed = False

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
        try:
            message = encode_call(call, call_id, hidden_dtype=hidden_dtype, reply_dtype=reply_dtype, segment=segment)
        except BaseException:
            if segment is not None:
                connection.give_back(segment)
            raise
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
        with self._lock:
            self._closed = True
            connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close("the client was closed")

    def _connection(self, name: str, address: str) -> _Connection:
        connection = self._connections.get(name)
        if connection is not None and connection.alive:
            return connection
        with self._lock:
            if self._closed:
                raise CallFailed("the client was closed")
            connection = self._connections.get(name)
            if connection is None or not connection.alive:
                if connection is not None:
                    connection.close("the connection was lost")
                connection = self._connections[name] = _Connection(name, address, self._shared_bytes)
            return connection
