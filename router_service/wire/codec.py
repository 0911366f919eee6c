"""RouterService's messages to and from tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from experts.errors import RequestError
from experts.wire.frame import decode_tensor, encode_frame, open_frame
from experts.wire.v1 import expert_pb2
from router_service.placement import PlacementTable
from router_service.wire.v1 import router_pb2 as pb


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterCall:
    """A decoded RouteRequest (no expert_ids_TK, no weights_TK) or DispatchRequest."""

    call_id: int
    layer: int
    hidden_TH: torch.Tensor
    expert_ids_TK: torch.Tensor | None = None
    weights_TK: torch.Tensor | None = None


def decode_route(data: bytes) -> RouterCall:
    """Read a RouteRequest. Raises RequestError naming the field."""
    head, body = open_frame(pb.RouteRequest, data, "hidden")
    return RouterCall(call_id=head.call_id, layer=head.layer, hidden_TH=decode_tensor(body, "hidden"))


def decode_dispatch(data: bytes) -> RouterCall:
    """Read a DispatchRequest. Raises RequestError naming the field."""
    head, body = open_frame(pb.DispatchRequest, data, "hidden")
    hidden_TH = decode_tensor(body, "hidden")
    if hidden_TH.dim() != 2:
        raise RequestError(f"hidden.shape: [T, H] expected, not {list(hidden_TH.shape)}", "hidden.shape")
    shape = (len(hidden_TH), head.experts_per_token)
    if not head.experts_per_token:
        raise RequestError("experts_per_token: at least 1 expected", "experts_per_token")
    return RouterCall(
        call_id=head.call_id,
        layer=head.layer,
        hidden_TH=hidden_TH,
        expert_ids_TK=_matrix(head.expert_ids, torch.int32, shape, "expert_ids"),
        weights_TK=_matrix(head.weights, torch.float32, shape, "weights"),
    )


def decode_stream(data: bytes) -> RouterCall:
    """Read a StreamRequest. Raises RequestError naming the field."""
    try:
        request = pb.StreamRequest.FromString(data)
    except DecodeError as error:
        raise RequestError(f"message: not a StreamRequest ({error})", "message") from None
    kind = request.WhichOneof("call")
    if kind is None:
        raise RequestError("call: one of route, dispatch expected", "call")
    if kind == "route":
        return decode_route(request.route.SerializeToString())
    return decode_dispatch(request.dispatch.SerializeToString())


def stream_call_id(data: bytes) -> int:
    """The call_id of a StreamRequest whose content is wrong; 0 where not even that can be read."""
    try:
        request = pb.StreamRequest.FromString(data)
    except DecodeError:
        return 0
    kind = request.WhichOneof("call")
    return int(getattr(request, kind).call_id) if kind else 0


def encode_combined(call_id: int, combined_TH: torch.Tensor) -> bytes:
    """A serialised CombinedReply with an answer."""
    return encode_frame(pb.CombinedReply(call_id=call_id), combined_TH)


def encode_failure(call_id: int, code: int, message: str) -> bytes:
    """A serialised CombinedReply that says why the call failed, for the stream to live on."""
    failure = expert_pb2.Failure(code=code, message=message)
    return pb.CombinedReply(call_id=call_id, failure=failure).SerializeToString()


def encode_placement(table: PlacementTable) -> pb.Placement:
    """The table as a message."""
    return pb.Placement(
        version=table.version,
        replicas=[
            pb.Placement.Replica(group=each.group, replica=each.replica, node=each.node, address=each.address)
            for each in table.replicas
        ],
        experts=[
            pb.Placement.Expert(layer=layer, expert=expert, groups=groups)
            for layer, holders in sorted(table.holders.items())
            for expert, groups in enumerate(holders)
        ],
    )


def _matrix(data: bytes, dtype: torch.dtype, shape: tuple[int, int], field: str) -> torch.Tensor:
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) != expected:
        raise RequestError(
            f"{field}: {len(data)} bytes, but {shape[0]} tokens of {shape[1]} experts need {expected} ({dtype})", field
        )
    return (torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)
