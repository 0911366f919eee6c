"""RouterService over gRPC: routing and dispatch for any engine, in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from experts.errors import ConfigError, GroupUnavailable, RequestError
from experts.wire.codec import MAX_MESSAGE_BYTES
from router_service.pending import Pending
from router_service.router import Router
from router_service.small_batches import SmallBatch
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

_MAX_CALLS = 256
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
# How often a watch of the placement looks whether its caller is still there.
_WATCH_S = 1.0


class RouterServer:
    """Serves one router on `host:port` (0: a free port), with standard health checking and reflection.

    A unary call's deadline and cancellation reach the experts. The calls of a stream share the router's own streams
    and are answered in the order they came; open several streams to have several calls out at once.

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

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 10.0) -> None:
        """Tell health watchers, give calls that are out `grace_s` to end, close everything."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()

    def _begin(self, call: RouterCall, timeout_s: float | None) -> Pending | SmallBatch:
        if call.expert_ids_TK is None or call.weights_TK is None:
            return self._router.route(call.layer, call.hidden_TH, timeout_s=timeout_s)
        return self._router.dispatch(
            call.layer, call.hidden_TH, call.expert_ids_TK, call.weights_TK, timeout_s=timeout_s
        )

    def _unary(self, decode: Callable[[bytes], RouterCall]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                call = decode(request)
                # A limit makes every call to a group an RPC of its own, which gRPC can cancel.
                left_s = context.time_remaining()
                pending = self._begin(call, _LONGEST_S if left_s is None else min(left_s, _LONGEST_S))
                if not context.add_callback(pending.cancel):
                    pending.cancel()  # the caller went away meanwhile
                return encode_combined(call.call_id, pending.result())
            except (RequestError, GroupUnavailable, TimeoutError) as error:
                context.abort(_code(error), str(error))
                raise AssertionError("abort raises") from None

        return answer

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            try:
                call = decode_stream(request)
                yield encode_combined(call.call_id, self._begin(call, None).result())
            except (RequestError, GroupUnavailable, TimeoutError) as error:
                yield encode_failure(stream_call_id(request), _code(error).value[0], str(error))

    def _get_placement(self, request: pb.GetPlacementRequest, context: grpc.ServicerContext) -> pb.Placement:
        table = self._router.table
        if table is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no placement has been published yet; watch it or ask again")
        assert table is not None, "abort raises"
        return encode_placement(table)

    def _watch_placement(
        self, request: pb.GetPlacementRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Placement]:
        table = None
        while context.is_active():
            newer = self._router.wait_table(table, _WATCH_S)
            if newer is not table and newer is not None:
                table = newer
                yield encode_placement(table)


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, RequestError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.UNAVAILABLE
