"""Calls to an expert group and their answers, as bytes.

Both ends hand gRPC these bytes as they are (no serialiser of its own), so that a tensor is copied once on its
way out and once on its way in. The layout is `ForwardRequest` and `ForwardReply` of expert.proto.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from experts.errors import ExpertNotResident, MeshError, RequestError
from experts.spec import ExpertCall
from experts.wire.frame import decode_tensor, encode_frame, split_frame, torch_dtype, wire_dtype
from experts.wire.v1 import expert_pb2 as pb

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
"""Largest message either end accepts: 18000 tokens of 7168 float32 values."""

# gRPC's status codes, as Failure.code carries them.
INVALID_ARGUMENT, NOT_FOUND, INTERNAL = 3, 5, 13


@dataclass(frozen=True, kw_only=True, slots=True)
class WireCall:
    """A decoded ForwardRequest. `reply_dtype` is what the caller wants the partial sums in."""

    call_id: int
    call: ExpertCall
    reply_dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class WireReply:
    """A decoded ForwardReply: the answer (float32, [T, H]) or the error that the caller should raise."""

    call_id: int
    partial_TH: torch.Tensor | None = None
    error: MeshError | None = None


class BadCall(RequestError):
    """A ForwardRequest whose content is wrong. `call_id` is the caller's, so that only that call fails."""

    def __init__(self, message: str, field: str | None, call_id: int) -> None:
        super().__init__(message, field)
        self.call_id = call_id


def encode_call(
    call: ExpertCall,
    call_id: int = 0,
    *,
    hidden_dtype: torch.dtype | None = None,
    reply_dtype: torch.dtype = torch.float32,
) -> bytes:
    """A serialised ForwardRequest.

    hidden_dtype: what `hidden_TH` travels in, its own by default (float8_e4m3fn: see `encode_frame`).
    reply_dtype: what the partial sums come back in.
    """
    head = pb.ForwardRequest(
        call_id=call_id,
        layer=call.layer,
        expert_ids=_raw(call.expert_ids_S, torch.int32),
        offsets=_raw(call.offsets_S1, torch.int32),
        token_rows=_raw(call.token_rows_R, torch.int32),
        weights=_raw(call.weights_R, torch.float32),
        reply_dtype=wire_dtype(reply_dtype),
    )
    return encode_frame(head, call.hidden_TH, hidden_dtype)


def decode_call(data: bytes) -> WireCall:
    """Read a ForwardRequest from the network and check that its parts agree with one another.

    Whether the group knows the layer, the experts and the width is the shard's to check. Raises BadCall
    (a RequestError) naming the field.
    """
    head_bytes, body = split_frame(data)
    try:
        head = pb.ForwardRequest.FromString(head_bytes)
    except DecodeError as error:
        raise RequestError(f"message: not a ForwardRequest ({error})", "message") from None
    try:
        call = ExpertCall(
            layer=head.layer,
            hidden_TH=decode_tensor(body, "hidden"),
            expert_ids_S=_vector(head.expert_ids, torch.int32, "expert_ids"),
            offsets_S1=_vector(head.offsets, torch.int32, "offsets"),
            token_rows_R=_vector(head.token_rows, torch.int32, "token_rows"),
            weights_R=_vector(head.weights, torch.float32, "weights"),
        )
        _check(call)
        reply_dtype = torch.float32
        if head.reply_dtype:
            reply_dtype = torch_dtype(head.reply_dtype, "reply_dtype")
        return WireCall(call_id=head.call_id, call=call, reply_dtype=reply_dtype)
    except RequestError as error:
        raise BadCall(str(error), error.field, head.call_id) from None


def encode_partial(call_id: int, partial_TH: torch.Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    """A serialised ForwardReply with an answer."""
    return encode_frame(pb.ForwardReply(call_id=call_id), partial_TH, dtype)


def encode_failure(call_id: int, error: Exception) -> bytes:
    """A serialised ForwardReply that says why the call failed, for the stream to live on."""
    if isinstance(error, ExpertNotResident):
        code = NOT_FOUND
    elif isinstance(error, RequestError):
        code = INVALID_ARGUMENT
    else:
        code = INTERNAL
    failure = pb.Failure(code=code, message=str(error) or type(error).__name__)
    return pb.ForwardReply(call_id=call_id, failure=failure).SerializeToString()


def decode_partial(data: bytes) -> WireReply:
    """Read a ForwardReply. Raises RequestError for bytes that are none."""
    head_bytes, body = split_frame(data)
    try:
        head = pb.ForwardReply.FromString(head_bytes)
    except DecodeError as error:
        raise RequestError(f"message: not a ForwardReply ({error})", "message") from None
    if not head.HasField("failure"):
        return WireReply(call_id=head.call_id, partial_TH=decode_tensor(body, "partial").float())
    message, failure = head.failure.message, MeshError(f"the expert group failed: {head.failure.message}")
    if head.failure.code == NOT_FOUND:
        failure = ExpertNotResident(message)
    elif head.failure.code == INVALID_ARGUMENT:
        failure = RequestError(message)
    return WireReply(call_id=head.call_id, error=failure)


def _raw(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    return tensor.to("cpu", dtype).numpy().tobytes()


def _vector(data: bytes, dtype: torch.dtype, field: str) -> torch.Tensor:
    if len(data) % 4:
        raise RequestError(f"{field}: {len(data)} bytes are not a whole number of {dtype} values", field)
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _check(call: ExpertCall) -> None:
    """The parts of a call agree: what the arithmetic relies on, it never indexes out of bounds after this."""
    if call.hidden_TH.dim() != 2:
        raise RequestError(f"hidden.shape: [T, H] expected, not {list(call.hidden_TH.shape)}", "hidden.shape")
    num_tokens, num_experts = len(call.hidden_TH), len(call.expert_ids_S)
    num_rows = len(call.token_rows_R)
    ids, offsets, rows = call.expert_ids_S.numpy(), call.offsets_S1.numpy(), call.token_rows_R.numpy()
    if num_experts and (ids[0] < 0 or (ids[1:] <= ids[:-1]).any()):
        raise RequestError("expert_ids: distinct non-negative ids in ascending order expected", "expert_ids")
    if len(offsets) != num_experts + 1:
        raise RequestError(
            f"offsets: {num_experts} experts need {num_experts + 1} offsets, not {len(offsets)}", "offsets"
        )
    if offsets[0] != 0 or offsets[-1] != num_rows or (offsets[1:] < offsets[:-1]).any():
        raise RequestError(
            f"offsets: must rise from 0 to the number of token_rows ({num_rows}), not {offsets[0]} to {offsets[-1]}",
            "offsets",
        )
    if num_rows and (rows.min() < 0 or rows.max() >= num_tokens):
        raise RequestError(f"token_rows: rows 0 to {num_tokens - 1} of hidden can be read", "token_rows")
    if len(call.weights_R) != num_rows:
        raise RequestError(f"weights: one per token_row ({num_rows}) expected, not {len(call.weights_R)}", "weights")
