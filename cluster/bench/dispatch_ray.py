"""Dispatch and combine over Ray object refs, and the actors at their far end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import torch

from cluster.bench.dispatch_case import DispatchBench, make_batch, make_router, medians
from cluster.bench.dispatch_peer import IdleGroup
from cluster.local_ray import start_local_ray
from experts.cancelled_calls import CancelledCalls
from router_service.placement import GroupReplica
from router_service.transport.ray_group import serve_calls
from router_service.transport.ray_refs import RayRefsTransport

_NAMESPACE = "expertmesh-bench"


def ray_row(bench: DispatchBench, num_tokens: int, replicas: Sequence[GroupReplica]) -> dict[str, Any]:
    """replicas: actors of `ray_peers`"""
    batch = make_batch(bench, num_tokens, len(replicas))
    router = make_router(bench, replicas, RayRefsTransport(_NAMESPACE))
    (router_us,) = medians(bench.seconds, (partial(batch.through, router),))
    router.close()
    return batch.row("ray", router_us)


class _Peer:
    """A Ray actor with a group that does no arithmetic."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        serve_calls(IdleGroup(), CancelledCalls(), _NAMESPACE)

    def ready(self) -> bool:
        return True


@contextmanager
def ray_peers(count: int) -> Iterator[list[GroupReplica]]:
    """So many groups, an actor each; starts Ray here, and stops it."""
    start_local_ray()
    try:
        names = [f"peer-{group}" for group in range(count)]
        actor_class = ray.remote(num_cpus=0)(_Peer)
        actors = [actor_class.options(name=name, namespace=_NAMESPACE).remote() for name in names]
        ray.get([actor.ready.remote() for actor in actors])
        yield [
            GroupReplica(group=group, replica=name, node="bench", address="", actor=name)
            for group, name in enumerate(names)
        ]
    finally:
        ray.shutdown()
