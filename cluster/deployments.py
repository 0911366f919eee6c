"""The Serve deployments (each replica is a Ray actor) around our plain classes. No logic of their own.

What a deployment hosts is imported in its constructor: an actor then loads only its own part (transformers alone costs
a process seconds and hundreds of megabytes), and whoever builds the application loads none of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config.load import parse_mesh
from cluster.control.client import ServeControllerClient
from cluster.running_app import application_details
from cluster.serve_log import log_with_serve
from cluster.topology import read_topology

if TYPE_CHECKING:
    from fastapi import FastAPI

    from cluster.config.mesh import MeshConfig
    from cluster.control.controller import Assignment
    from experts.spec import ExpertKey
    from router_service.placement import GroupReplica, PlacementTable
    from router_service.transport.base import Transport

Document = Mapping[str, Any]

# Long-lived watches and waiting requests count as ongoing: our own queue bounds them, not Serve's.
_UNBOUNDED = 100_000
# Where Serve names its replicas' actors.
_NAMESPACE = "serve"


class ControllerActor:
    """Controller of the application; one replica."""

    async def __init__(self, document: Document) -> None:  # type: ignore[misc]  # Serve awaits constructors
        from cluster.control.controller import Controller
        from cluster.model_files import open_checkpoint
        from experts.weights.layout import describe_experts
        from router_service.transport.grpc_health import watch_health

        log_with_serve()
        config = parse_mesh(document, origin="mesh")
        checkpoint = open_checkpoint(config.model)
        layout = describe_experts(checkpoint, checkpoint.config())
        self._controller = Controller(
            experts_per_layer=layout.experts_per_layer,
            num_groups=config.experts.groups,
            num_redundant_experts=config.experts.num_redundant_experts,
            watch_health=watch_health,
        )
        if config.autoscaling.worker_groups is not None:
            from cluster.autoscale.worker_groups import follow_worker_groups

            follow_worker_groups(
                config.autoscaling.worker_groups, application=application_details, ray_nodes=ray.nodes
            ).start()

    async def join(
        self, replica: GroupReplica, *, device: str, resident: frozenset[ExpertKey], known_version: int
    ) -> Assignment:
        # A group's pod has no token to ask Kubernetes where it is; we have.
        machine = await asyncio.to_thread(_machine, replica.node)
        return await self._controller.join(
            replace(replica, node=machine), device=device, resident=resident, known_version=known_version
        )

    async def progress(self, replica: str, loaded_bytes: int, total_bytes: int) -> None:
        await self._controller.progress(replica, loaded_bytes, total_bytes)

    async def ready(self, replica: str) -> None:
        await self._controller.ready(replica)

    async def retire(self, replica: str) -> None:
        await self._controller.retire(replica)

    async def leave(self, replica: str) -> None:
        await self._controller.leave(replica)

    async def load_share(self, replica: str, tokens_per_s: float) -> float:
        return await self._controller.load_share(replica, tokens_per_s)

    async def watch(self, known_version: int) -> AsyncIterator[PlacementTable]:
        async for table in self._controller.watch(known_version):
            yield table

    async def status(self) -> dict[str, Any]:
        return self._controller.status()


class GroupActor:
    """One expert group; every replica of this deployment is a whole copy of the group."""

    async def __init__(  # type: ignore[misc]
        self, group: int, document: Document, controller: DeploymentHandle
    ) -> None:
        from cluster.group_host import GroupHost, HostIdentity
        from router_service.transport.ray_group import serve_calls

        log_with_serve()
        context = ray.get_runtime_context()
        identity = HostIdentity(
            replica=serve.get_replica_context().replica_tag,
            node=context.get_node_id(),
            host=ray.util.get_node_ip_address(),
            actor=context.get_actor_name() or "",
        )
        self._host = GroupHost(
            group=group,
            config=parse_mesh(document, origin="mesh"),
            controller=ServeControllerClient(controller),
            identity=identity,
            owns_process=True,
        )
        serve_calls(self._host.group, self._host.cancelled, _NAMESPACE)
        await self._host.start()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._host.meter.stats()

    async def check_health(self) -> None:
        self._host.check()

    async def __del__(self) -> None:
        if host := getattr(self, "_host", None):
            await host.stop()


class EngineActor:
    """The HTTP ingress: OpenAI API, engine and router in one process."""

    async def __init__(  # type: ignore[misc]
        self, document: Document, controller: DeploymentHandle | None, *groups: DeploymentHandle
    ) -> None:
        from cluster.engine_host import EngineHost

        log_with_serve()
        # The groups' handles are taken so that Serve deploys them with the application; calls go straight to them.
        config = parse_mesh(document, origin="mesh")
        self._host = EngineHost(
            config=config,
            controller=ServeControllerClient(controller) if controller is not None else None,
            transport=_transport(config),
            node=await asyncio.to_thread(_machine, ray.get_runtime_context().get_node_id()),
            address=ray.util.get_node_ip_address(),
            owns_process=True,
        )
        await self._host.start()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return self._host.app

    async def router_service(self) -> tuple[str, str | None]:
        """This replica, and host:port of its RouterService; None where it offers none."""
        return serve.get_replica_context().replica_tag, self._host.service_address

    async def end_sequences(self) -> None:
        await self._host.end_sequences()

    async def check_health(self) -> None:
        self._host.check()

    async def __del__(self) -> None:
        if host := getattr(self, "_host", None):
            await host.stop()


def _transport(config: MeshConfig) -> Transport | None:
    if config.router.transport == "grpc":
        from router_service.transport.grpc_stream import GrpcTransport

        return GrpcTransport(wire_dtype=config.router.wire_dtype)
    if config.router.transport == "ray":
        from router_service.transport.ray_refs import RayRefsTransport

        return RayRefsTransport(_NAMESPACE, config.router.wire_dtype)
    return None


def _machine(ray_node_id: str) -> str:
    """What placement tables call the machine under a Ray node; several may share one."""
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ
    return read_topology(ray.nodes(), _pod_labels if in_kubernetes else None)[ray_node_id].name


def _pod_labels() -> Mapping[str, Mapping[str, str]]:
    from cluster.kubernetes.connect import connect, own_namespace
    from cluster.kubernetes.nodes import labels_by_pod_ip

    return labels_by_pod_ip(connect(), own_namespace())


# A dead actor should be noticed within a second. Serve's requests in progress are not our calls in flight: those go
# past it, and `stop` of each host drains them.
_SUPERVISION = {
    "max_ongoing_requests": _UNBOUNDED,
    "health_check_period_s": 1,
    "health_check_timeout_s": 30,
    "graceful_shutdown_wait_loop_s": 0.1,
}
CONTROLLER: Any = serve.deployment(
    name="controller", graceful_shutdown_timeout_s=1, ray_actor_options={"num_cpus": 0}, **_SUPERVISION
)(ControllerActor)
GROUP: Any = serve.deployment(graceful_shutdown_timeout_s=30, **_SUPERVISION)(GroupActor)
ENGINE: Any = serve.deployment(name="engine", graceful_shutdown_timeout_s=60, **_SUPERVISION)(
    serve.ingress()(EngineActor)
)
