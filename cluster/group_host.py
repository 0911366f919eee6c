"""Hosts one expert group in one process: serve, join, load what was assigned, ready; and again when the controller
is lost. Knows no Ray: `cluster.deployments` wraps it as a Ray actor and as a Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass

import torch

from cluster.checkpoints import open_checkpoint
from cluster.config.mesh import MeshConfig
from cluster.control.client import ControllerClient
from cluster.control.controller import Assignment
from cluster.control.follow import RETRY_S
from experts.group import ExpertGroup
from experts.ops.backend import build_backend
from experts.server import ExpertServer
from experts.weights.layout import describe_experts
from router_service.placement import GroupReplica, PlacementTable
from router_service.transport.ray_refs import serve_calls

log = logging.getLogger(__name__)
_PROGRESS_S = 1.0


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
    """One replica of one expert group. `start()` returns when it holds its experts and engines may call it."""

    def __init__(
        self, *, group: int, config: MeshConfig, controller: ControllerClient, identity: HostIdentity
    ) -> None:
        self._config = config
        self._controller = controller
        self._checkpoint, model_config = open_checkpoint(config.model)
        self._layout = describe_experts(self._checkpoint, model_config)
        self._device = _device(config.experts.device)
        dtype = model_dtype(config.model.dtype, model_config, self._device)
        backend = build_backend(
            self._layout.spec,
            device=self._device,
            dtype=dtype,
            quantization=config.model.quantization,
            num_threads=1,
        )
        self._group = ExpertGroup(group, self._layout.spec, backend)
        self._server = ExpertServer(self._group, host=identity.host)
        self._identity = identity
        self._version = 0
        self._loaded = asyncio.Event()
        self._member: asyncio.Task[None] | None = None
