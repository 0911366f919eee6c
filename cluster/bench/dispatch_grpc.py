"""Dispatch and combine over gRPC, beside a bare echo, and with shared memory beside without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc

from cluster.bench.dispatch_case import DispatchBench, make_batch, make_router, medians
from cluster.bench.dispatch_peer import ECHO
from experts.wire.codec import MAX_MESSAGE_BYTES
from router_service.placement import GroupReplica
from router_service.transport.grpc_stream import GrpcTransport


def grpc_row(bench: DispatchBench, num_tokens: int, peers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """peers: (group's address, echo's address) of each"""
    replicas = [
        GroupReplica(group=group, replica=f"peer-{group}", node="bench", address=address)
        for group, (address, _) in enumerate(peers)
    ]
    batch = make_batch(bench, num_tokens, len(peers))
    echoes = [_Echo(address) for _, address in peers]
    # As it is served, with shared memory from the first byte on, and without any.
    transports = (GrpcTransport(), GrpcTransport(shared_bytes=0), GrpcTransport(shared_bytes=math.inf))
    routers = [make_router(bench, replicas, transport) for transport in transports]
    served, with_shared, without_shared = (partial(batch.through, router) for router in routers)

    def echo() -> None:
        for each, data in zip(echoes, batch.payloads, strict=True):
            each.send(data)
        for each in echoes:
            each.receive()

    try:
        router_us, echo_us = medians(bench.seconds, (served, echo))
        with_us, without_us = medians(bench.seconds, (with_shared, without_shared))
    finally:
        for router in routers:
            router.close()
        for each in echoes:
            each.close()
    return batch.row("grpc", router_us) | {
        "echo_p50_us": round(echo_us, 1),
        "ratio_to_echo": round(router_us / echo_us, 3),
        "with_shared_memory_us": round(with_us, 1),
        "without_shared_memory_us": round(without_us, 1),
        "without_shared_memory_ratio": round(without_us / with_us, 3),
    }


class _Echo:
    """A bare stream to one peer."""

    def __init__(self, address: str) -> None:
        limits = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
        channel = grpc.insecure_channel(address, options=[(name, MAX_MESSAGE_BYTES) for name in limits])
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._replies = channel.stream_stream(ECHO)(iter(self._requests.get, None))

    def send(self, data: bytes) -> None:
        self._requests.put(data)

    def receive(self) -> None:
        next(self._replies)

    def close(self) -> None:
        self._requests.put(None)
