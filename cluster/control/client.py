"""The controller as its callers see it, and the one place that knows it is a Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # Ray brings these along; importing them would cost torch
    from cluster.control.controller import Assignment
    from experts.spec import ExpertKey
    from router_service.placement import GroupReplica, PlacementTable


class ControllerClient(Protocol):
    """What groups and engines ask of the controller. Any call may raise when the controller is gone: call again."""

    async def join(
        self, replica: GroupReplica, *, device: str, resident: frozenset[ExpertKey], known_version: int
    ) -> Assignment: ...
    async def progress(self, replica: str, loaded_bytes: int, total_bytes: int) -> None: ...
    async def ready(self, replica: str) -> None: ...
    async def retire(self, replica: str) -> None: ...
    async def leave(self, replica: str) -> None: ...
    async def load_share(self, replica: str, tokens_per_s: float) -> float: ...
    def watch(self, known_version: int) -> AsyncIterator[PlacementTable]: ...


class ServeControllerClient:
    """ControllerClient over a Serve DeploymentHandle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def join(
        self, replica: GroupReplica, *, device: str, resident: frozenset[ExpertKey], known_version: int
    ) -> Assignment:
        answer: Assignment = await self._handle.join.remote(
            replica, device=device, resident=resident, known_version=known_version
        )
        return answer

    async def progress(self, replica: str, loaded_bytes: int, total_bytes: int) -> None:
        await self._handle.progress.remote(replica, loaded_bytes, total_bytes)

    async def ready(self, replica: str) -> None:
        await self._handle.ready.remote(replica)

    async def retire(self, replica: str) -> None:
        await self._handle.retire.remote(replica)

    async def leave(self, replica: str) -> None:
        await self._handle.leave.remote(replica)

    async def load_share(self, replica: str, tokens_per_s: float) -> float:
        share: float = await self._handle.load_share.remote(replica, tokens_per_s)
        return share

    async def watch(self, known_version: int) -> AsyncIterator[PlacementTable]:
        async for table in self._handle.options(stream=True).watch.remote(known_version):
            yield table
