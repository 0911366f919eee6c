"""Runs a node's call: own share here, the siblings' over the loopback, one sum back."""

from __future__ import annotations

from functools import lru_cache

import torch

from experts.errors import MeshError
from experts.node_call import NodeCall, NodeShare
from experts.spec import ExpertCall, Forwards
from experts.wire.client import CallFailed, ExpertClient, Reply
from experts.wire.own_address import is_own

# A sibling that is stopped in the middle of a call must not keep our thread; whoever called has given up by then.
_SIBLING_TIMEOUT_S = 60.0
_is_here = lru_cache(maxsize=1024)(is_own)


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
        for share in call.shares:
            if share.address and not _is_here(share.address):
                raise MeshError(f"group {share.group} at {share.address} is not on this node, where this call was sent")
        calls = [share.call(call.layer, call.hidden_TH) for share in call.shares]
        sent = [
            self._send(share, each) if share.address else None for share, each in zip(call.shares, calls, strict=True)
        ]
        own = [self._group.forward(each) for reply, each in zip(sent, calls, strict=True) if reply is None]
        sum_TH = torch.zeros(call.hidden_TH.shape, dtype=torch.float32)
        for share, reply in zip(call.shares, sent, strict=True):
            try:
                partial_TH = own.pop(0) if reply is None else reply.result(_SIBLING_TIMEOUT_S)
            except CallFailed as error:
                raise _named(share, error) from error
            if share.tokens_T is None:
                sum_TH += partial_TH.cpu()
            else:
                sum_TH.index_add_(0, share.tokens_T, partial_TH.cpu())
        return sum_TH

    def _send(self, share: NodeShare, call: ExpertCall) -> Reply:
        try:
            return self._client.send(share.address, share.address, call)
        except CallFailed as error:
            raise _named(share, error) from error

    def close(self) -> None:
        """Drop the connections to the siblings."""
        self._client.close()


def _named(share: NodeShare, error: CallFailed) -> MeshError:
    return MeshError(f"group {share.group} at {share.address} on this node: {error}")
