"""Calls to an expert group and their answers, as bytes.

Both ends hand gRPC these bytes as they are (no serialiser of its own), so that a tensor is copied once on its
way out and once on its way in. The layout is `ForwardRequest` and `ForwardReply` of expert.proto.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypedDict

import numpy as np
import torch

from experts.errors import ExpertNotResident, MeshError, RequestError, SegmentUnreachable
from experts.node_call import NodeCall, NodeShare
from experts.spec import ExpertCall
from experts.wire.frame import decode_tensor, encode_frame, open_frame, torch_dtype, wire_dtype
from experts.wire.shared_memory import Place, Segment, SharedBytes
from experts.wire.v1 import expert_pb2 as pb

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
"""Largest message either end accepts: 18000 tokens of 7168 float32 values."""

MAX_EXPERTS = 65536
"""Most experts that a call may name."""

# gRPC's status codes, as Failure.code carries them.
CANCELLED, INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, INTERNAL = 1, 3, 5, 9, 13
# What surrounds the numbers of a message without shared memory is shorter.
_FRAME_BYTES = 128
_ALL = np.empty(0, np.int32)
_ROW_DTYPES = (torch.int32, torch.int32, torch.int32, torch.float32)
# Answers begin at whole cache lines of a segment.
_LINE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class WireCall:
    """A decoded ForwardRequest. `reply_dtype` is what the caller wants the partial sums in, `reply_place` where."""

    call_id: int
    call: ExpertCall | NodeCall
    reply_dtype: torch.dtype
    reply_place: Place | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WireReply:
    """A decoded ForwardReply: the answer (float32, [T, H]) or the error that the caller should raise."""

    call_id: int
    partial_TH: torch.Tensor | None = None
    error: MeshError | None = None


class BadCall(RequestError):
    """A ForwardRequest whose content is wrong (`__cause__`). `call_id`: the caller's, so that only that call fails."""

    def __init__(self, message: str, field: str | None, call_id: int) -> None:
        super().__init__(message, field)
        self.call_id = call_id


class CallCancelled(MeshError):
    """Whoever called does not want the answer any more."""


def encode_call(
    call: ExpertCall | NodeCall,
    call_id: int = 0,
    *,
    hidden_dtype: torch.dtype | None = None,
    reply_dtype: torch.dtype = torch.float32,
    segment: Segment | None = None,
) -> bytes:
    """A serialised ForwardRequest.

    hidden_dtype: what `hidden_TH` travels in, its own by default (float8_e4m3fn: see `encode_frame`).
    reply_dtype: what the partial sums come back in.
    segment: where the hidden states go and the answer is to come, `segment_bytes` long or more; None: with the message
    """
    if segment is None and (message := _write_ordinary(call, call_id, hidden_dtype, reply_dtype)) is not None:
        return message
    head = pb.ForwardRequest(call_id=call_id, layer=call.layer, reply_dtype=wire_dtype(reply_dtype))
    if isinstance(call, NodeCall):
        for share in call.shares:
            tokens = b"" if share.tokens_T is None else _raw(share.tokens_T, torch.int32)
            _encode_rows(share, head.shares.add(group=share.group, address=share.address, tokens=tokens))
    else:
        _encode_rows(call, head)
    if segment is None:
        return encode_frame(head, call.hidden_TH, hidden_dtype)
    hidden_bytes = call.hidden_TH.numel() * (hidden_dtype or call.hidden_TH.dtype).itemsize
    head.reply_place.segment, head.reply_place.offset = segment.name, -(-hidden_bytes // _LINE) * _LINE
    return encode_frame(head, call.hidden_TH, hidden_dtype, segment.place(0, hidden_bytes))


def segment_bytes(num_values: int, hidden_dtype: torch.dtype, reply_dtype: torch.dtype) -> int:
    """Shared memory that a call of `num_values` (T * H) hidden values needs for them and the answer."""
    return -(-num_values * hidden_dtype.itemsize // _LINE) * _LINE + num_values * reply_dtype.itemsize


def decode_call(data: bytes | memoryview, shared: SharedBytes | None = None) -> WireCall:
    """Read a ForwardRequest from the network and check that its parts agree with one another.

    shared: finds data in shared memory, which the call then reads in place; None: none is accepted

    Whether the group knows the layer, the experts and the width is the shard's to check. Raises BadCall
    (a RequestError) naming the field.
    """
    head, body = open_frame(pb.ForwardRequest, data, "hidden")
    try:
        hidden_TH = decode_tensor(body, "hidden", shared, copy=False)
        if hidden_TH.dim() != 2:
            raise RequestError(f"hidden.shape: [T, H] expected, not {list(hidden_TH.shape)}", "hidden.shape")
        call: ExpertCall | NodeCall
        if head.shares:
            shares = tuple(_decode_share(share, len(hidden_TH)) for share in head.shares)
            call = NodeCall(layer=head.layer, hidden_TH=hidden_TH, shares=shares)
        else:
            call = ExpertCall(layer=head.layer, hidden_TH=hidden_TH, **_decode_rows(head, len(hidden_TH)))
        reply_dtype = torch.float32
        if head.reply_dtype:
            reply_dtype = torch_dtype(head.reply_dtype, "reply_dtype")
        place = None
        if head.HasField("reply_place"):
            if shared is None:
                raise SegmentUnreachable("reply_place: shared memory is not taken here", "reply_place")
            segment, offset = head.reply_place.segment, head.reply_place.offset
            memory = shared.view(segment, offset, hidden_TH.numel() * reply_dtype.itemsize)
            place = Place(segment=segment, offset=offset, memory=memory)
        return WireCall(call_id=head.call_id, call=call, reply_dtype=reply_dtype, reply_place=place)
    except RequestError as error:
        raise BadCall(str(error), error.field, head.call_id) from error


def encode_partial(
    call_id: int, partial_TH: torch.Tensor, dtype: torch.dtype = torch.float32, place: Place | None = None
) -> bytes:
    """A serialised ForwardReply with an answer, or with its place."""
    return encode_frame(pb.ForwardReply(call_id=call_id), partial_TH, dtype, place)


def encode_failure(call_id: int, error: Exception) -> bytes:
    """A serialised ForwardReply that says why the call failed, for the stream to live on."""
    if isinstance(error, CallCancelled):
        code = CANCELLED
    elif isinstance(error, ExpertNotResident):
        code = NOT_FOUND
    elif isinstance(error.__cause__, SegmentUnreachable):
        code = FAILED_PRECONDITION
    elif isinstance(error, RequestError):
        code = INVALID_ARGUMENT
    else:
        code = INTERNAL
    failure = pb.Failure(code=code, message=str(error) or type(error).__name__)
    return pb.ForwardReply(call_id=call_id, failure=failure).SerializeToString()


def decode_partial(data: bytes | memoryview, shared: SharedBytes | None = None) -> WireReply:
    """Read a ForwardReply, copying what lies in shared memory. Raises RequestError for bytes that are none."""
    numbers, values = np.empty(3, np.int64), np.empty(len(data) // 4, np.float32)
    if compiled_reader()(np.frombuffer(data, np.uint8), values, numbers):
        call_id, num_tokens, width = numbers.tolist()
        partial_TH = torch.from_numpy(values[: num_tokens * width].reshape(num_tokens, width))
        return WireReply(call_id=call_id, partial_TH=partial_TH)
    head, body = open_frame(pb.ForwardReply, data, "partial")
    if not head.HasField("failure"):
        return WireReply(call_id=head.call_id, partial_TH=decode_tensor(body, "partial", shared).float())
    message, failure = head.failure.message, MeshError(f"the expert group failed: {head.failure.message}")
    if head.failure.code == NOT_FOUND:
        failure = ExpertNotResident(message)
    elif head.failure.code == FAILED_PRECONDITION:
        failure = SegmentUnreachable(message)
    elif head.failure.code == INVALID_ARGUMENT:
        failure = RequestError(message)
    return WireReply(call_id=head.call_id, error=failure)


@cache
def compiled_writer() -> Callable[..., int]:
    """What writes ordinary calls; the first call compiles it."""
    # Loads LLVM, which whoever only answers does not need.
    from experts.wire._numba.write_call import compile_write_call

    return compile_write_call()


@cache
def compiled_reader() -> Callable[..., bool]:
    """What reads ordinary answers; the first call compiles it."""
    # Loads LLVM, which whoever only answers does not need.
    from experts.wire._numba.read_partial import compile_read_partial

    return compile_read_partial()


def _write_ordinary(
    call: ExpertCall | NodeCall, call_id: int, hidden_dtype: torch.dtype | None, reply_dtype: torch.dtype
) -> bytes | None:
    """The message of a call in float32 on the CPU; None for any other."""
    hidden_TH = call.hidden_TH
    if (
        isinstance(call, NodeCall)
        or hidden_dtype not in (None, torch.float32)
        or reply_dtype is not torch.float32
        or hidden_TH.dtype is not torch.float32
        or hidden_TH.is_cuda
        or not hidden_TH.numel()
    ):
        return None
    rows = (call.expert_ids_S, call.offsets_S1, call.token_rows_R, call.weights_R)
    if any(each.dtype is not dtype for each, dtype in zip(rows, _ROW_DTYPES, strict=True)):
        return None
    message = np.empty(hidden_TH.nbytes + sum(each.nbytes for each in rows) + _FRAME_BYTES, np.uint8)
    size = compiled_writer()(
        *(call_id, call.layer, hidden_TH.detach().contiguous().numpy(), _ALL, *(each.numpy() for each in rows)),
        message,
    )
    return message[:size].tobytes()


def _raw(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    # Each no-op on a tensor costs as much as the copy of a decode batch's indices.
    if tensor.dtype is not dtype or tensor.is_cuda:
        tensor = tensor.to("cpu", dtype)
    return tensor.numpy().tobytes()


def _vector(data: bytes, dtype: torch.dtype, field: str) -> torch.Tensor:
    if len(data) % 4:
        raise RequestError(f"{field}: {len(data)} bytes are not a whole number of {dtype} values", field)
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


class _Rows(TypedDict):
    expert_ids_S: torch.Tensor
    offsets_S1: torch.Tensor
    token_rows_R: torch.Tensor
    weights_R: torch.Tensor


def _encode_rows(call: ExpertCall | NodeShare, message: pb.ForwardRequest | pb.NodeShare) -> None:
    message.expert_ids = _raw(call.expert_ids_S, torch.int32)
    message.offsets = _raw(call.offsets_S1, torch.int32)
    message.token_rows = _raw(call.token_rows_R, torch.int32)
    message.weights = _raw(call.weights_R, torch.float32)


def _decode_rows(message: pb.ForwardRequest | pb.NodeShare, num_tokens: int) -> _Rows:
    rows = _Rows(
        expert_ids_S=_vector(message.expert_ids, torch.int32, "expert_ids"),
        offsets_S1=_vector(message.offsets, torch.int32, "offsets"),
        token_rows_R=_vector(message.token_rows, torch.int32, "token_rows"),
        weights_R=_vector(message.weights, torch.float32, "weights"),
    )
    _check(num_tokens, **rows)
    return rows


def _decode_share(message: pb.NodeShare, num_tokens: int) -> NodeShare:
    tokens_T = _vector(message.tokens, torch.int32, "shares.tokens") if message.tokens else None
    if tokens_T is not None:
        tokens = tokens_T.numpy()
        if tokens[0] < 0 or tokens[-1] >= num_tokens or (tokens[1:] <= tokens[:-1]).any():
            raise RequestError(
                f"shares.tokens: distinct rows 0 to {num_tokens - 1} of hidden in ascending order expected",
                "shares.tokens",
            )
        num_tokens = len(tokens)
    rows = _decode_rows(message, num_tokens)
    return NodeShare(group=message.group, address=message.address, tokens_T=tokens_T, **rows)


def _check(
    num_tokens: int,
    expert_ids_S: torch.Tensor,
    offsets_S1: torch.Tensor,
    token_rows_R: torch.Tensor,
    weights_R: torch.Tensor,
) -> None:
    """The parts of a call agree: what the arithmetic relies on, it never indexes out of bounds after this."""
    if len(expert_ids_S) > MAX_EXPERTS or len(offsets_S1) > MAX_EXPERTS + 1:
        raise RequestError(f"expert_ids: {len(expert_ids_S)} experts; no layer has over {MAX_EXPERTS}", "expert_ids")
    # There are never many experts: lists are looked through in less time than numpy takes to begin.
    ids, offsets, num_rows = expert_ids_S.tolist(), offsets_S1.tolist(), len(token_rows_R)
    if not all(map(operator.lt, [-1, *ids], ids)):
        raise RequestError("expert_ids: distinct non-negative ids in ascending order expected", "expert_ids")
    if len(offsets) != len(ids) + 1:
        raise RequestError(f"offsets: {len(ids)} experts need {len(ids) + 1} offsets, not {len(offsets)}", "offsets")
    if offsets[0] != 0 or offsets[-1] != num_rows or not all(map(operator.le, offsets, offsets[1:])):
        raise RequestError(
            f"offsets: must rise from 0 to the number of token_rows ({num_rows}), not {offsets[0]} to {offsets[-1]}",
            "offsets",
        )
    if num_rows > num_tokens * len(ids):
        raise RequestError(
            f"token_rows: {num_rows} rows; an expert reads each of {num_tokens} tokens once", "token_rows"
        )
    if num_rows and token_rows_R.numpy().view(np.uint32).max() >= num_tokens:  # a negative row is a large one
        raise RequestError(f"token_rows: rows 0 to {num_tokens - 1} of hidden can be read", "token_rows")
    if len(weights_R) != num_rows:
        raise RequestError(f"weights: one per token_row ({num_rows}) expected, not {len(weights_R)}", "weights")
