"""Groups in this very process: no bytes move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from experts.errors import MeshError
from experts.spec import ExpertCall
from router_service.placement import GroupReplica
from router_service.transport.base import TransportError


class Forwards(Protocol):
    """The one thing asked of a group here."""

    def forward(self, call: ExpertCall) -> torch.Tensor: ...


class _Answer:
    def __init__(self, outcome: torch.Tensor | MeshError) -> None:
        self._outcome = outcome

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        if isinstance(self._outcome, MeshError):
            raise self._outcome
        return self._outcome


class InProcessTransport:
    """groups: replica name -> group. `send` computes at once: on a GPU that only queues the kernels."""

    def __init__(self, groups: Mapping[str, Forwards]) -> None:
        self._groups = groups

    def send(self, replica: GroupReplica, call: ExpertCall) -> _Answer:
        group = self._groups.get(replica.replica)
        if group is None:
            raise TransportError(f"replica {replica.replica} does not live in this process")
        try:
            return _Answer(group.forward(call))
        except MeshError as error:
            return _Answer(error)

    def forget(self, replica: GroupReplica) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Nothing to drop."""
