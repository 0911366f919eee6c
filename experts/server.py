"""ExpertService over gRPC: one thread a stream, which reads a call, runs it and answers it.

Callers on the same machine have their streams over a Unix socket (`experts.wire.local_stream`), with the same messages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from experts.cancelled_calls import CancelledCalls
from experts.errors import ConfigError, ExpertNotResident, RequestError
from experts.group import ExpertGroup
from experts.node_call import NodeCall
from experts.node_relay import NodeRelay
from experts.spec import ExpertCall
from experts.wire.codec import (
    MAX_MESSAGE_BYTES,
    BadCall,
    decode_call,
    encode_failure,
    encode_partial,
)
from experts.wire.local_stream import LocalServer
from experts.wire.shared_memory import MappedSegments
from experts.wire.v1 import expert_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ExpertService"].full_name

_MAX_STREAMS = 512
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # Callers ping idle connections to find dead machines; gRPC's default takes that for abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class ExpertServer:
    """Serves one group on `host:port` (0: a free port), with standard health checking and reflection.

    address: host:port that it listens on
    cancelled: what callers have told it to skip, which whoever else brings calls to the group asks too

    Raises ConfigError where the port is taken.
    """

    def __init__(self, group: ExpertGroup, host: str = "127.0.0.1", port: int = 0) -> None:
        self._group = group
        self._relay = NodeRelay(group)
        self.cancelled = CancelledCalls()
        self._idle = threading.Condition()
        self._calls = 0
        self._server = grpc.server(ThreadPoolExecutor(_MAX_STREAMS, "expert-stream"), options=_OPTIONS)
        handlers = {
            "Forward": grpc.unary_unary_rpc_method_handler(self._forward),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
            "Cancel": grpc.unary_unary_rpc_method_handler(
                self._cancel, pb.CancelRequest.FromString, pb.CancelReply.SerializeToString
            ),
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise ConfigError(f"cannot listen on {host}:{port}; is the port taken?") from None
        self.address = f"{host}:{bound}"
        self._local = LocalServer(self.address, self._stream, max_message_bytes=MAX_MESSAGE_BYTES)

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        self._local.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 10.0) -> None:
        """Tell health watchers, answer the calls that are being computed, close every stream.

        grace_s: longest wait for those calls
        """
        self._health.enter_graceful_shutdown()
        with self._idle:
            self._idle.wait_for(lambda: not self._calls, grace_s)
        self._local.stop()
        self._server.stop(grace=None).wait()
        self._relay.close()

    def _stream(self, requests: Iterator[bytes], _: grpc.ServicerContext | None = None) -> Iterator[bytes]:
        segments = MappedSegments()
        for request in requests:
            # We are resumed once the answer is out, so a call counts until then.
            with self._counted():
                yield self._answer(request, segments)

    def _answer(self, request: bytes, segments: MappedSegments) -> bytes:
        call_id = 0
        with suppress(Exception):  # whatever it was, the other way can say whose call failed
            small = self._group.answer(request)
            if small is not None:
                return small.reply
        try:
            wire = decode_call(request, segments)
            call_id = wire.call_id
            # Only now that a segment which the call may have brought is open: the answer takes its name away.
            self.cancelled.check(call_id)
            return encode_partial(call_id, self._run(wire.call), wire.reply_dtype, wire.reply_place)
        except Exception as error:
            # Whatever went wrong, the stream and its other calls live on.
            return encode_failure(error.call_id if isinstance(error, BadCall) else call_id, error)

    def _forward(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._counted():
            try:
                wire = decode_call(request)
                if not context.is_active():
                    context.abort(grpc.StatusCode.CANCELLED, "the caller went away before its call began")
                return encode_partial(wire.call_id, self._run(wire.call), wire.reply_dtype)
            except RequestError as error:
                code = grpc.StatusCode.INVALID_ARGUMENT
                if isinstance(error, ExpertNotResident):
                    code = grpc.StatusCode.NOT_FOUND
                context.abort(code, str(error))
                raise AssertionError("abort raises") from None

    def _cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelReply:
        self.cancelled.add(request.call_ids)
        return pb.CancelReply()

    def _run(self, call: ExpertCall | NodeCall) -> torch.Tensor:
        return self._relay.forward(call) if isinstance(call, NodeCall) else self._group.forward(call)

    def _describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        described = self._group.describe()
        return pb.DescribeReply(
            group=described.group,
            device=described.device,
            hidden_size=described.spec.hidden_size,
            intermediate_size=described.spec.intermediate_size,
            slots=[
                pb.DescribeReply.Slot(layer=key.layer, expert=key.expert, checksum=checksum)
                for key, checksum in described.checksums.items()
            ],
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._idle:
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                if not self._calls:
                    self._idle.notify_all()
