"""Hosts one expert group in one process: server up, join, load what was assigned, ready; and again if the controller
is lost. Knows no Ray: `cluster.deployments` wraps it as a Ray actor and as a Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass

import torch

from cluster.config.mesh import MeshConfig
from cluster.control.client import ControllerClient
from experts.group import ExpertGroup
from experts.ops.backend import build_backend
from experts.server import ExpertServer
from experts.shard import ExpertShard
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.placement import GroupReplica, PlacementTable
from router_service.transport.ray_refs import serve_calls

log = logging.getLogger(__name__)
_RETRY_S = 0.5
_PROGRESS_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostIdentity:
    """Who this process is. replica: unique per start. address_host: where its ExpertService listens."""

    replica: str
    node: str
    address_host: str
    actor: str = ""
