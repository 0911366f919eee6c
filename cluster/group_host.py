"""Hosts one expert group in one process: serve, join, load what was assigned, ready; and again when the controller
is lost. Knows no Ray: `cluster.deployments` wraps it as a Serve deployment, whose replicas are Ray actors."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from dataclasses import dataclass

import torch

from cluster.autoscale.meter import GroupMeter
from cluster.config.mesh import MeshConfig
from cluster.control.client import ControllerClient
from cluster.control.controller import Assignment
from cluster.cores import keep_process_to, own_cores, usable_cores
from cluster.metered_group import MeteredGroup
from cluster.model_files import expert_backend, open_checkpoint, pick_device
from experts.server import ExpertServer
from experts.weights.layout import describe_experts
from router_service.placement import GroupReplica

log = logging.getLogger(__name__)
# gRPC's threads must get a word in while a call is computed; Python's 5 ms is several calls' time.
_SWITCH_INTERVAL_S = 0.0002
_RETRY_S = 0.5
_PROGRESS_S = 0.5
_LOG_PROGRESS_S = 5.0
_REPORT_S = 2.0
_LEAVE_S = 5.0
# An engine that has the newest table calls a leaving replica no more: quiet for so long, all have it.
_QUIET_S = 0.5
# Below the deployment's graceful_shutdown_timeout_s; then Serve would kill us in the middle of a call.
_DRAIN_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostIdentity:
    """Who this process is.

    replica: unique per start. host: address that its ExpertService listens on. actor: its Ray actor's name, or empty.
    """

    replica: str
    node: str
    host: str
    actor: str = ""


class GroupHost:
    """One replica of one expert group.

    owns_process: nothing else runs in this process, which may be kept to some of its cores

    Raises CheckpointError or ConfigError where the model cannot be read.
    """

    def __init__(
        self,
        *,
        group: int,
        config: MeshConfig,
        controller: ControllerClient,
        identity: HostIdentity,
        owns_process: bool = False,
    ) -> None:
        self._controller = controller
        self._checkpoint = open_checkpoint(config.model)
        model_config = self._checkpoint.config()
        self._layout = describe_experts(self._checkpoint, model_config)
        device = pick_device(config.experts.device)
        # The backend spreads whole experts over its own threads; see ThreadTeam.
        torch.set_num_threads(1)
        self._backend = expert_backend(config, self._layout.spec, model_config, device, num_threads=1)
        self.meter = GroupMeter(time.monotonic)
        self.group = MeteredGroup(group, self._layout.spec, self._backend, self.meter)
        host = identity.host if config.experts.listen_host == "auto" else config.experts.listen_host
        self._server = ExpertServer(self.group, host=host)
        self.cancelled = self._server.cancelled
        self._device = str(device)
        self._me = GroupReplica(
            group=group,
            replica=identity.replica,
            node=identity.node,
            address=self._server.address,
            actor=identity.actor,
        )
        self._cores = usable_cores()
        self._may_move = owns_process and device.type == "cpu"
        self._version = 0
        self._entered = asyncio.Event()
        self._membership: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when the group holds its experts and the table says so. Raises what loading raised."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._server.start()
        self._membership = asyncio.create_task(self._stay_member())
        entered = asyncio.create_task(self._entered.wait())
        await asyncio.wait({entered, self._membership}, return_when=asyncio.FIRST_COMPLETED)
        if self._membership.done():
            entered.cancel()
            await self._membership

    def check(self) -> None:
        """Raise if this replica no longer takes part."""
        if self._membership is not None and self._membership.done():
            self._membership.result()

    async def stop(self) -> None:
        """Let new calls go elsewhere, finish those in flight, leave the table, stop answering."""
        if self._membership is not None:
            self._membership.cancel()
        try:
            await asyncio.wait_for(self._controller.retire(self._me.replica), _LEAVE_S)
            await self._drained()
            await asyncio.wait_for(self._controller.leave(self._me.replica), _LEAVE_S)
        except Exception as error:  # without a controller, engines see the connection close
            log.warning("left without telling the controller (%s)", type(error).__name__)
        await asyncio.to_thread(self._server.stop)

    async def _drained(self) -> None:
        """Wait until no call came for a while, or it takes too long: what is in flight then fails over."""
        retired = time.monotonic()
        while (waited_s := time.monotonic() - retired) < _DRAIN_S:
            quiet_s = min(waited_s, self.meter.idle_s())
            if quiet_s >= _QUIET_S:
                break
            await asyncio.sleep(_QUIET_S - quiet_s)

    async def _stay_member(self) -> None:
        """Join, load, be ready; when the controller is lost, announce to the next one what is held already."""
        while True:
            try:
                resident = frozenset(self.group.describe().checksums)
                assignment = await self._controller.join(
                    self._me, device=self._device, resident=resident, known_version=self._version
                )
                self._share_cores(assignment)
                await self._load(assignment)
                await self._controller.ready(self._me.replica)
                self._entered.set()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._follow())
                    tasks.create_task(self._report_load())
            except (ValueError, asyncio.CancelledError):
                raise  # a model that cannot be loaded stays so
            except Exception as error:  # whatever Ray raises for a controller that died
                log.warning("lost the controller (%s); joining again", type(error).__name__)
            await asyncio.sleep(_RETRY_S)

    def _share_cores(self, assignment: Assignment) -> None:
        """A group that waits for a core on which another one computes would wait for all of its call."""
        groups = assignment.groups_on_host
        own = own_cores(groups.index(self._me.group), len(groups))
        if own and self._may_move:
            self._may_move = False
            keep_process_to(own)
        self._backend.use_threads(max(1, self._cores // assignment.replicas_on_host))

    async def _follow(self) -> None:
        async for table in self._controller.watch(self._version):
            self._version = table.version
        raise ConnectionError("the controller ended its watch")

    async def _report_load(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            tokens_per_s = self.meter.stats()["tokens_per_s"]
            self.meter.set_load_share(await self._controller.load_share(self._me.replica, tokens_per_s))

    async def _load(self, assignment: Assignment) -> None:
        loop, told, logged = asyncio.get_running_loop(), 0.0, 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told, logged
            now = time.monotonic()
            if done == total or now - logged > _LOG_PROGRESS_S:
                logged = now
                log.info("loaded %.1f of %.1f MB", done / 1e6, total / 1e6)
            if done == total or now - told > _PROGRESS_S:
                told = now
                asyncio.run_coroutine_threadsafe(self._controller.progress(self._me.replica, done, total), loop)

        await asyncio.to_thread(self.group.assign, self._layout, self._checkpoint, assignment.keys, progress)
