"""Calls over gRPC, through the client of ExpertService."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experts.node_call import NodeCall
from experts.spec import ExpertCall
from experts.wire.client import SHARED_BYTES, CallAbandoned, CallFailed, ExpertClient, Reply
from experts.wire.lane import Lane
from experts.wire.own_address import is_own
from router_service.placement import GroupReplica
from router_service.transport.base import ReplyAbandoned, TransportError, relay_of
from router_service.transport.wire_dtype import WireDtype, wire_dtypes


class _Reply:
    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        try:
            return self._reply.result(timeout_s)
        except CallAbandoned as error:
            raise ReplyAbandoned(str(error)) from error
        except CallFailed as error:
            raise TransportError(str(error)) from error

    def cancel(self) -> None:
        self._reply.cancel()


class GrpcTransport:
    """One stream per replica, kept until it breaks or the replica leaves the table. Thread-safe.

    Large tensors stay in shared memory where the replica is on this machine (`experts.wire.shared_memory`).

    wire_dtype: what tensors travel in, see `WireDtype`
    shared_bytes: from how many bytes on, see ExpertClient
    """

    def __init__(self, wire_dtype: WireDtype = "model", *, shared_bytes: float = SHARED_BYTES) -> None:
        hidden_dtype, reply_dtype = wire_dtypes(wire_dtype)
        self._is_plain = wire_dtype == "model"
        self._shared_bytes = shared_bytes
        self._client = ExpertClient(hidden_dtype=hidden_dtype, reply_dtype=reply_dtype, shared_bytes=shared_bytes)

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> _Reply:
        return self._send(replica, call, timeout_s)

    def sends_inline(self, num_bytes: int) -> bool:
        """Whether float32 hidden states of so many bytes travel as they are, and never through shared memory."""
        return self._is_plain and 2 * num_bytes < self._shared_bytes

    @staticmethod
    def lane(replicas: Sequence[GroupReplica]) -> Lane | None:
        """To ask several replicas with compiled code; None where one is not on this machine, or not ours."""
        addresses = [replica.address for replica in replicas]
        return Lane.to(addresses) if all(map(is_own, addresses)) else None

    def send_node(self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None) -> _Reply:
        return self._send(relay_of(replicas, call), call, timeout_s)

    def forget(self, replica: GroupReplica) -> None:
        self._client.drop(replica.replica, "the replica left the placement table")

    def close(self) -> None:
        self._client.close()

    def _send(self, replica: GroupReplica, call: ExpertCall | NodeCall, timeout_s: float | None) -> _Reply:
        try:
            return _Reply(self._client.send(replica.replica, replica.address, call, timeout_s))
        except CallFailed as error:
            raise TransportError(str(error)) from error
