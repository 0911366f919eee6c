"""Groups in this very process: no bytes move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from experts.errors import MeshError
from experts.node_call import NodeCall
from experts.spec import ExpertCall, Forwards
from router_service.combine import Combiner
from router_service.placement import GroupReplica
from router_service.transport.base import TransportError


class _Answer:
    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._outcome: torch.Tensor | MeshError
        try:
            self._outcome = compute()
        except MeshError as error:
            self._outcome = error

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        if isinstance(self._outcome, MeshError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        """Computed already."""


class InProcessTransport:
    """groups: replica name -> group. `send` computes at once: on a GPU that only queues the kernels."""

    def __init__(self, groups: Mapping[str, Forwards]) -> None:
        self._groups = groups

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> _Answer:
        group = self._group(replica)
        return _Answer(lambda: group.forward(call))

    def send_node(self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None) -> _Answer:
        groups = [self._group(replica) for replica in replicas]

        def compute() -> torch.Tensor:
            combiner = Combiner(call.hidden_TH.shape[0], call.hidden_TH.shape[1], call.hidden_TH.device)
            for group, share in zip(groups, call.shares, strict=True):
                tokens_T = None if share.tokens_T is None else share.tokens_T.numpy()
                combiner.add(tokens_T, group.forward(share.call(call.layer, call.hidden_TH)))
            return combiner.result(torch.float32)

        return _Answer(compute)

    def forget(self, replica: GroupReplica) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Nothing to drop."""

    def _group(self, replica: GroupReplica) -> Forwards:
        group = self._groups.get(replica.replica)
        if group is None:
            raise TransportError(f"replica {replica.replica} does not live in this process")
        return group
