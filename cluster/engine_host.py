"""Hosts one engine in one process: router, skeleton, engine and HTTP application, put together. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping

import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from cluster.api_keys import read_api_keys
from cluster.config.mesh import EngineConfig, MeshConfig
from cluster.control.client import ControllerClient
from cluster.control.follow import follow_tables
from cluster.cores import keep_python_to, keep_threads_to, own_cores, usable_cores
from cluster.engine_limits import engine_limits
from cluster.gate_options import check_gate_options, with_capacity
from cluster.local_experts import local_experts
from cluster.model_files import engine_dtype, open_checkpoint, pick_device, served_name
from cluster.observe.expert_metrics import ExpertMetrics
from cluster.serving.engine import Engine
from cluster.serving.health import GroupHealth, Health
from cluster.serving.model_runner import OverlapThresholds
from cluster.serving.openai_api import create_app
from cluster.serving.skeleton import ModelSkeleton, load_skeleton
from cluster.serving.tokenizer import Tokenizer, load_tokenizer
from experts.errors import ConfigError
from experts.ops.cpu_threads import ThreadTeam
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from experts.wire.own_address import is_own
from router_service.gating.capacity import CapacityGate
from router_service.gating.gate import Gate
from router_service.placement import PlacementTable
from router_service.router import Router
from router_service.server import RouterServer
from router_service.transport.base import Transport

log = logging.getLogger(__name__)
# gRPC's threads must get a word in while the engine's thread computes; Python's 5 ms is a layer's time.
_SWITCH_INTERVAL_S = 0.0002


class EngineHost:
    """One engine replica.

    controller, transport: who publishes placement tables and how calls reach the groups in them; None with
    `router.transport: in_process`, where the experts live in this process.
    node:    this machine as placement tables name it; groups of another one then share a message; None: they do not
    address: where RouterService listens, if it is offered
    owns_process: nothing else runs in this process, whose Python threads may be kept to some of its cores

    Raises CheckpointError or ConfigError where the model cannot be read.
    """

    def __init__(
        self,
        *,
        config: MeshConfig,
        controller: ControllerClient | None,
        transport: Transport | None,
        node: str | None = None,
        address: str = "127.0.0.1",
        owns_process: bool = False,
    ) -> None:
        self._owns_process = owns_process
        self._config = config
        self._controller = controller
        self._transport = transport
        self._node = node
        self._address = address
        keys = read_api_keys(config.http.api_keys_file)
        self._api_keys = frozenset(keys) if keys is not None else None
        self._has_table = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._router: Router | None = None
        self._engine: Engine | None = None
        self._app: FastAPI | None = None
        self._service: RouterServer | None = None

    @property
    def app(self) -> FastAPI:
        """The HTTP application, after `start`."""
        assert self._app is not None, "start() comes first"
        return self._app

    @property
    def service_address(self) -> str | None:
        """host:port of RouterService; None where it is not offered."""
        return self._service.address if self._service is not None else None

    async def start(self) -> None:
        """Return when requests can be answered."""
        config = self._config
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        checkpoint = open_checkpoint(config.model)
        skeleton, tokenizer = await asyncio.to_thread(self._load, checkpoint)
        if self._transport is None:
            table, transport = await asyncio.to_thread(local_experts, checkpoint, config)
        else:
            table, transport = None, self._transport
        experts_per_layer = describe_experts(checkpoint, checkpoint.config()).experts_per_layer
        gates = with_capacity(skeleton.gates, experts_per_layer, config.router)
        self._router = Router(
            transport,
            gates,
            recovery_timeout_s=config.router.recovery_timeout_s,
            on_expert_loss=config.experts.on_expert_loss,
            node=self._node if self._transport is not None else None,
            max_nodes_per_token=config.router.max_nodes_per_token,
            node_limit_mode=config.router.node_limit_mode,
        )
        skeleton.connect(self._router)
        max_model_len, kv_cache_memory = engine_limits(
            config.engine, skeleton.kv_layout, skeleton.max_position_embeddings
        )
        self._engine = Engine(
            skeleton,
            max_num_seqs=config.engine.max_num_seqs,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_cache_memory=kv_cache_memory,
            max_queue_len=config.engine.max_queue_len,
            overlap=_overlap(config.engine),
        )
        self._engine.start()
        self._app = create_app(
            self._engine,
            tokenizer,
            model_name=served_name(config.model),
            health=self._health,
            api_keys=self._api_keys,
            registry=self._registry(self._router, gates),
        )
        if config.router.service_port is not None:
            try:
                self._service = RouterServer(self._router, host=self._address, port=config.router.service_port)
            except ConfigError as error:
                raise ConfigError(
                    f"router.service_port: {error} Give another, or 0 for any: engines of one node cannot share it"
                ) from None
            self._service.start()
            log.info("RouterService listens on %s", self._service.address)
        if table is not None:
            self._router.update(table)
        else:
            assert self._controller is not None, "groups in other processes need a controller"
            self._following = asyncio.create_task(follow_tables(self._controller, self._on_table))
            await self._has_table.wait()
            assert self._router.table is not None
            self._choose_cores(self._router.table)

    def check(self) -> None:
        """Raise if this engine no longer works."""
        if self._following is not None and self._following.done():
            self._following.result()

    async def end_sequences(self) -> None:
        """Take no request any more; sequences that are still running end with an error event."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    async def stop(self) -> None:
        """Stop the engine, as `end_sequences` does, and all that is around it."""
        if self._following is not None:
            self._following.cancel()
        if self._service is not None:
            await asyncio.to_thread(self._service.stop)
        await self.end_sequences()
        if self._router is not None:
            self._router.close()

    def _load(self, checkpoint: Checkpoint) -> tuple[ModelSkeleton, Tokenizer]:
        check_gate_options(self._config.router, checkpoint.config())
        device = pick_device(self._config.engine.device)
        dtype = engine_dtype(self._config.model.dtype, checkpoint.config(), device)
        if device.type == "cpu":
            # Ray allows an actor one thread. Groups on this machine are idle while the engine computes, and it is
            # while they do.
            torch.set_num_threads(usable_cores())
        return load_skeleton(checkpoint, dtype=dtype, device=device), load_tokenizer(checkpoint.directory)

    def _registry(self, router: Router, gates: Mapping[int, Gate]) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(
            ExpertMetrics(
                model_name=served_name(self._config.model),
                transport=self._config.router.transport,
                counters=router.counters,
                table=lambda: router.table,
                capacity_gates=[gate for gate in gates.values() if isinstance(gate, CapacityGate)],
            )
        )
        return registry

    def _on_table(self, table: PlacementTable) -> None:
        assert self._router is not None
        self._router.update(table)
        self._has_table.set()

    def _choose_cores(self, table: PlacementTable) -> None:
        """Where groups have cores of their own beside us, be on those of the last, to which we send last: the others
        are at work before it needs them. Several engines would all be there.

        Helpers leave one core of ours alone: woken on that of the thread which they are to help, one waits there."""
        config = self._config
        alone = self._owns_process and config.engine.replicas == 1 and config.autoscaling.engine is None
        if alone and pick_device(config.engine.device).type == "cpu":
            here = {replica.group for replica in table.replicas if is_own(replica.address)}
            if cores := own_cores(len(here) - 1, len(here)):
                keep_threads_to(frozenset(os.sched_getaffinity(0)) - {max(cores)}, ThreadTeam.NAME)
                keep_python_to(cores, free=(ThreadTeam.NAME,))

    def _health(self) -> Health:
        table = self._router.table if self._router is not None else None
        if table is None:
            return Health(problems=("no placement table yet: expert groups are still loading",))
        missing = set(table.missing_groups())
        reason = f"no live replica in placement version {table.version}; its actor is being restarted"
        return Health(
            groups=tuple(
                GroupHealth(group=group, alive=group not in missing, reason=reason if group in missing else None)
                for group in range(table.num_groups)
            )
        )


def _overlap(engine: EngineConfig) -> OverlapThresholds | None:
    if not engine.enable_dbo:
        return None
    return OverlapThresholds(
        decode_tokens=engine.dbo_decode_token_threshold, prefill_tokens=engine.dbo_prefill_token_threshold
    )
