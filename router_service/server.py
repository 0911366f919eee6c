"""RouterService over gRPC: routing and dispatch for any engine, in any process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from experts.errors import ConfigError, GroupUnavailable, RequestError
from experts.wire.codec import MAX_MESSAGE_BYTES
from router_service.pending import Pending
from router_service.router import Router
from router_service.small_batch import SmallBatch
from router_service.wire.codec import (
    RouterCall,
    decode_dispatch,
    decode_route,
    decode_stream,
    encode_combined,
    encode_failure,
    encode_placement,
    stream_call_id,
)
from router_service.wire.v1 import router_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["RouterService"].full_name

_MAX_CALLS = 512
# Of these, so many may be streams, or watch the placement: each has a thread for as long as it lasts, and calls and
# health checks need theirs.
_MAX_STREAMS, _MAX_WATCHES = 256, 64
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # Callers ping idle connections to find dead machines; gRPC's default takes that for abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)
# Of calls without a deadline, to which gRPC gives one that is centuries away.
_LONGEST_S = 86_400.0
_NO_PLACEMENT = "no placement has been published yet; watch it or ask again"
# How often who waits for a placement looks whether that is still wanted.
_WATCH_S = 1.0


class RouterServer:
    """Serves one router on `host:port` (0: a free port), with standard health checking and reflection.

    The deadline and the cancellation of an RPC reach the experts: what they have not begun they do not compute. A
    stream without a deadline is the quick way: its calls go to the groups as an engine's do, with no RPC of their own.
    The calls of a stream are answered in the order they came; open several streams to have several calls out at once.
    Until the router has a placement table health is NOT_SERVING, and calls are UNAVAILABLE.

    address: host:port that it listens on

    Raises ConfigError where the port is taken.
    """

    def __init__(self, router: Router, host: str = "127.0.0.1", port: int = 0) -> None:
        self._router = router
        self._server = grpc.server(ThreadPoolExecutor(_MAX_CALLS, "router-call"), options=_OPTIONS)
        handlers = {
            "Forward": grpc.unary_unary_rpc_method_handler(self._unary(decode_route)),
            "Dispatch": grpc.unary_unary_rpc_method_handler(self._unary(decode_dispatch)),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
            "GetPlacement": grpc.unary_unary_rpc_method_handler(
                self._get_placement, pb.GetPlacementRequest.FromString, pb.Placement.SerializeToString
            ),
            "WatchPlacement": grpc.unary_stream_rpc_method_handler(
                self._watch_placement, pb.GetPlacementRequest.FromString, pb.Placement.SerializeToString
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
        self._stopping = threading.Event()
        self._streams, self._watches = threading.Semaphore(_MAX_STREAMS), threading.Semaphore(_MAX_WATCHES)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def start(self) -> None:
        """Begin to answer."""
        if self._router.table is not None:
            self._set_health(health_pb2.HealthCheckResponse.SERVING)
        else:
            threading.Thread(target=self._await_table, name="router-health", daemon=True).start()
        self._server.start()

    def stop(self, grace_s: float = 10.0) -> None:
        """Tell health watchers, give calls that are out `grace_s` to end, close everything."""
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE):
            self._health.set(service, status)

    def _await_table(self) -> None:
        while not self._stopping.is_set():
            if self._router.wait_table(None, _WATCH_S) is not None:
                self._set_health(health_pb2.HealthCheckResponse.SERVING)
                return

    def _begin(self, call: RouterCall, timeout_s: float | None) -> Pending | SmallBatch:
        if self._router.table is None:
            raise GroupUnavailable(_NO_PLACEMENT, 0)  # rather than keep a thread until there is one
        if call.expert_ids_TK is None or call.weights_TK is None:
            return self._router.route(call.layer, call.hidden_TH, timeout_s=timeout_s)
        return self._router.dispatch(
            call.layer, call.hidden_TH, call.expert_ids_TK, call.weights_TK, timeout_s=timeout_s
        )

    def _combined(self, call: RouterCall, rpc: _Rpc) -> bytes:
        return encode_combined(call.call_id, rpc.result(self._begin(call, rpc.left_s)))

    def _unary(self, decode: Callable[[bytes], RouterCall]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                return self._combined(decode(request), _Rpc(context))
            except (RequestError, GroupUnavailable, TimeoutError) as error:
                context.abort(_code(error), str(error))
                raise AssertionError("abort raises") from None

        return answer

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        _keep_thread(self._streams, context, f"{_MAX_STREAMS} streams are open already; close one that is idle")
        rpc = _Rpc(context, is_stream=True)
        for request in requests:
            try:
                yield self._combined(decode_stream(request), rpc)
            except (RequestError, GroupUnavailable, TimeoutError) as error:
                yield encode_failure(stream_call_id(request), _code(error).value[0], str(error))

    def _get_placement(self, request: pb.GetPlacementRequest, context: grpc.ServicerContext) -> pb.Placement:
        table = self._router.table
        if table is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, _NO_PLACEMENT)
        assert table is not None, "abort raises"
        return encode_placement(table)

    def _watch_placement(
        self, request: pb.GetPlacementRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Placement]:
        _keep_thread(self._watches, context, f"{_MAX_WATCHES} watch already; ask with GetPlacement")
        table = None
        while context.is_active():
            if self._stopping.is_set():
                context.abort(grpc.StatusCode.UNAVAILABLE, "this engine stops; watch another's placement")
            newer = self._router.wait_table(table, _WATCH_S)
            if newer is not table and newer is not None:
                table = newer
                yield encode_placement(table)


class _Rpc:
    """An RPC, and the call that it has out, which is cancelled when the RPC ends."""

    def __init__(self, context: grpc.ServicerContext, *, is_stream: bool = False) -> None:
        self._context = context
        self._is_stream = is_stream
        self._pending: Pending | SmallBatch | None = None
        self._ended = not context.add_callback(self._end)

    @property
    def left_s(self) -> float | None:
        """Its time remaining, which makes every call to a group an RPC of its own; None for the quick way."""
        left_s: float | None = self._context.time_remaining()
        if left_s is not None and left_s < _LONGEST_S:
            return left_s
        return None if self._is_stream else _LONGEST_S

    def result(self, pending: Pending | SmallBatch) -> torch.Tensor:
        """What `pending` gives. Raises TimeoutError where the RPC ended first."""
        self._pending = pending
        if self._ended:
            pending.cancel()
        try:
            return pending.result()
        finally:
            self._pending = None

    def _end(self) -> None:
        # In this order, and `result` in the other, one of the two sees a call that begins now.
        self._ended = True
        if (pending := self._pending) is not None:
            pending.cancel()


def _keep_thread(places: threading.Semaphore, context: grpc.ServicerContext, refusal: str) -> None:
    """Take one of `places` until the RPC ends; abort it where none is left."""
    if not places.acquire(blocking=False):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, refusal)
    if not context.add_callback(places.release):  # it has ended already
        places.release()


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, RequestError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.UNAVAILABLE
