"""Calls over gRPC: one bidirectional stream per replica, opened at the first call.

A stream beats unary calls by half at any size that we send: no new HTTP/2 stream, no scheduling of a
handler. The thread that waits for a reply reads the stream itself, so that no thread has to wake another;
when several wait, one reads for all.
"""

from __future__ import annotations

import itertools
import threading
import time
from queue import SimpleQueue

import grpc
import torch

from experts.errors import RequestError
from experts.spec import ExpertCall
from experts.wire.codec import WireReply, decode_partial, encode_call
from router_service.placement import GroupReplica
from router_service.transport.base import TransportError
from router_service.transport.grpc_options import CHANNEL_OPTIONS

_STREAM = "/expertmesh.experts.v1.ExpertService/Stream"
# How often overdue replies are looked for; a reply is given up at most so long after its deadline.
_WATCH_S = 0.2


class _ReplicaStream:
    """One stream and the replies that it owes. Dies with its first error; the transport then opens
    another."""

    def __init__(self, replica: GroupReplica) -> None:
        self._where = f"{replica.replica} at {replica.address}"
        self._channel = grpc.insecure_channel(replica.address, options=CHANNEL_OPTIONS)
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._call = self._channel.stream_stream(_STREAM)(iter(self._requests.get, None))
        self._changed = threading.Condition()
        self._reading = False
        self._wanted: set[int] = set()
        self._arrived: dict[int, WireReply] = {}
        self._deadlines: dict[int, float] = {}
        self._error: TransportError | None = None

    @property
    def alive(self) -> bool:
        return self._error is None and self._call.is_active()

    @property
    def held(self) -> int:
        return len(self._arrived)

    def send(self, call_id: int, message: bytes) -> None:
        self._wanted.add(call_id)
        self._requests.put(message)

    def wait(self, call_id: int, timeout_s: float | None) -> WireReply:
        """The reply to `call_id`. Raises TransportError once the stream is dead or the deadline has
        passed."""
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
            reply = decode_partial(next(self._call))
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
                self._error = TransportError(f"{self._where}: {reason}")
            self._changed.notify_all()
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()

    def _dead(self) -> TransportError:
        assert self._error is not None, "close() sets it"
        return self._error


class _Reply:
    """A reply that is owed. Where nobody waits for it, it is dropped when it arrives."""

    def __init__(self, stream: _ReplicaStream, call_id: int) -> None:
        self._stream = stream
        self._call_id = call_id

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        reply = self._stream.wait(self._call_id, timeout_s)
        if isinstance(reply.error, RequestError):
            raise reply.error
        if reply.error is not None:
            raise TransportError(str(reply.error)) from reply.error
        assert reply.partial_TH is not None, "a reply holds an answer or an error"
        return reply.partial_TH

    def __del__(self) -> None:
        self._stream.abandon(self._call_id)


class GrpcTransport:
    """One stream per replica, kept until it breaks or the replica leaves the table. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, _ReplicaStream] = {}
        self._call_ids = itertools.count(1)
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="grpc-deadlines", daemon=True)
        self._watcher.start()

    def send(self, replica: GroupReplica, call: ExpertCall) -> _Reply:
        call_id = next(self._call_ids)
        message = encode_call(call, call_id)
        stream = self._stream(replica)
        stream.send(call_id, message)
        return _Reply(stream, call_id)

    def forget(self, replica: GroupReplica) -> None:
        with self._lock:
            stream = self._streams.pop(replica.replica, None)
        if stream is not None:
            stream.close("the replica left the placement table")

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.close("the transport was closed")
        self._watcher.join()

    def replies_held(self) -> int:
        """Replies that arrived and wait to be taken."""
        return sum(stream.held for stream in list(self._streams.values()))

    def _stream(self, replica: GroupReplica) -> _ReplicaStream:
        stream = self._streams.get(replica.replica)
        if stream is not None and stream.alive:
            return stream
        with self._lock:
            if self._closed.is_set():
                raise TransportError("the transport was closed")
            stream = self._streams.get(replica.replica)
            if stream is None or not stream.alive:
                if stream is not None:
                    stream.close("the connection was lost")
                stream = self._streams[replica.replica] = _ReplicaStream(replica)
            return stream

    def _watch(self) -> None:
        """End streams that owe a reply past its deadline: whoever waits is inside gRPC and cannot look
        itself."""
        while not self._closed.wait(_WATCH_S):
            now = time.monotonic()
            for stream in list(self._streams.values()):
                if stream.overdue(now):
                    stream.close("no reply within the deadline")
