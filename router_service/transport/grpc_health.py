"""Notices at once when a group replica is gone: a standing Watch on its standard gRPC health service."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# A dead machine sends no reset: pings find it within keepalive time + timeout.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_retries", 0),
)


async def watch_health(address: str) -> str:
    """Return, with the reason, when the server at `address` (host:port) stops serving or its connection
    breaks."""
    async with grpc.aio.insecure_channel(address, options=_KEEPALIVE) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        try:
            async for reply in watch:
                if reply.status != health_pb2.HealthCheckResponse.SERVING:
                    return "it reports that it stopped serving"
        except grpc.aio.AioRpcError as error:
            return f"its connection broke ({error.code().name})"
        return "it ended its health stream"
