"""Runs a node's call: own share here, the siblings' over the loopback, one sum back."""

from __future__ import annotations

from typing import Protocol

import torch

from experts.errors import MeshError
from experts.node_call import NodeCall
from experts.spec import ExpertCall
from experts.wire.client import CallFailed, ExpertClient


class Forwards(Protocol):
    """The one thing asked of a group here."""

    def forward(self, call: ExpertCall) -> torch.Tensor: ...


class NodeRelay:
    """The receiving end of node calls for `group`. Thread-safe."""

    def __init__(self, group: Forwards) -> None:
        self._group = group
        self._client = ExpertClient()

    def forward(self, call: NodeCall) -> torch.Tensor:
        """`partial_TH`, float32: the sum of all shares in the order given.

        Raises RequestError as `ExpertGroup.forward` does, from whichever group; MeshError naming the sibling that
        did not answer.
        """
        sent = {
            share.address: self._client.send(share.address, share.address, share.call(call.layer, call.hidden_TH))
            for share in call.shares
            if share.address
        }
        own = [
            self._group.forward(share.call(call.layer, call.hidden_TH)) for share in call.shares if not share.address
        ]
        sum_TH = torch.zeros(call.hidden_TH.shape, dtype=torch.float32)
        for share in call.shares:
            try:
                partial_TH = sent[share.address].result() if share.address else own.pop(0)
            except CallFailed as error:
                raise MeshError(f"group {share.group} at {share.address} on this node: {error}") from error
            if share.tokens_T is None:
                sum_TH += partial_TH.cpu()
            else:
                sum_TH.index_add_(0, share.tokens_T, partial_TH.cpu())
        return sum_TH

    def close(self) -> None:
        """Drop the connections to the siblings."""
        self._client.close()
