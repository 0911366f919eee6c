"""Tells an expert group which calls nobody wants any more."""

from __future__ import annotations

from contextlib import suppress

import grpc

from experts.wire.v1 import expert_pb2 as pb

_METHOD = f"/{pb.DESCRIPTOR.services_by_name['ExpertService'].full_name}/Cancel"
_TIMEOUT_S = 10.0


class Canceller:
    """For the group whose ExpertService listens at `address`, to which the first call connects. Thread-safe."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._cancel = self._channel.unary_unary(_METHOD, pb.CancelRequest.SerializeToString)

    def cancel(self, call_id: int) -> None:
        """Have the group skip a call that it has not begun. Never waits; a group that cannot be told computes it."""
        with suppress(ValueError):  # closed
            told = self._cancel.future(pb.CancelRequest(call_ids=[call_id]), timeout=_TIMEOUT_S)
            told.add_done_callback(_ignore)  # which keeps it: grpcio cancels what nobody holds

    def close(self) -> None:
        """Disconnect; nothing is told any more."""
        self._channel.close()


def _ignore(_: grpc.Future) -> None:
    """Told or not, nobody waits for it."""
