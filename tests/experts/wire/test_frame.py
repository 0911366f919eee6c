"""Frames are protobuf, whatever the tensor; no bytes from the network do worse than a RequestError."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import RequestError
from experts.spec import ExpertCall
from experts.wire import frame
from experts.wire.codec import decode_call, decode_partial, encode_call
from experts.wire.frame import decode_tensor, encode_frame, split_frame
from experts.wire.v1 import expert_pb2 as pb

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    call_id=st.integers(0, 2**64 - 1),
    message=st.text(max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_a_frame_is_what_protobuf_would_write(shape: list[int], dtype: torch.dtype, call_id: int, message: str) -> None:
    tensor = torch.randn(*shape).to(dtype)
    head = pb.ForwardReply(call_id=call_id, failure=pb.Failure(message=message))
    written = encode_frame(head, tensor)
    parsed = pb.ForwardReply.FromString(written)
    assert (parsed.call_id, parsed.failure.message, list(parsed.partial.shape)) == (call_id, message, shape)
    for data in (written, parsed.SerializeToString()):
        head_bytes, body = split_frame(data)
        assert pb.ForwardReply.FromString(head_bytes) == head
        got = decode_tensor(body, "partial")
        assert got.dtype is dtype
        torch.testing.assert_close(got, tensor, rtol=0, atol=0)


def test_a_frame_without_field_15_has_an_empty_body() -> None:
    head = pb.ForwardReply(call_id=7)
    head_bytes, body = split_frame(head.SerializeToString())
    assert pb.ForwardReply.FromString(head_bytes) == head
    assert not body


@pytest.mark.parametrize("shape", [[0, 2**31, 1], [0, 1, 1, 1]])
def test_absurd_shapes_are_refused(shape: list[int]) -> None:
    body = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape).SerializeToString()
    with pytest.raises(RequestError, match=r"^hidden\.shape: at most 3 sizes below 2\^31"):
        decode_tensor(body, "hidden")


def test_other_dtypes_do_not_travel() -> None:
    with pytest.raises(RequestError, match=r"dtype torch\.float64 does not travel; use one of float32"):
        encode_frame(pb.ForwardReply(), torch.zeros(1, dtype=torch.float64))


VALID = encode_call(
    ExpertCall(
        layer=1,
        hidden_TH=torch.ones(2, 3),
        expert_ids_S=torch.tensor([0, 4], dtype=torch.int32),
        offsets_S1=torch.tensor([0, 1, 2], dtype=torch.int32),
        token_rows_R=torch.tensor([0, 1], dtype=torch.int32),
        weights_R=torch.ones(2),
    ),
    call_id=3,
)


# Messages that protobuf reads as a whole, and those whose tensor is found by stepping over fields.
BOTH_WAYS = pytest.mark.parametrize("plain_bytes", [frame._PLAIN_BYTES, -1])


@BOTH_WAYS
@given(data=st.binary(max_size=60))
def test_arbitrary_bytes(plain_bytes: int, data: bytes) -> None:
    with mock.patch.object(frame, "_PLAIN_BYTES", plain_bytes):
        for decode in (decode_call, decode_partial):
            with contextlib.suppress(RequestError):
                decode(data)


@BOTH_WAYS
@given(
    damage=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.booleans(),
)
@settings(max_examples=400)
def test_damaged_calls_are_refused_or_consistent(plain_bytes: int, damage: list[tuple[int, int]], cut: bool) -> None:
    data = bytearray(VALID)
    for position, value in damage:
        data[position] = value
    try:
        with mock.patch.object(frame, "_PLAIN_BYTES", plain_bytes):
            call = decode_call(bytes(data[: damage[0][0]] if cut else data)).call
    except RequestError:
        return
    rows = call.token_rows_R
    assert call.offsets_S1.tolist() == sorted(call.offsets_S1.tolist())
    assert call.offsets_S1[0] == 0
    assert call.offsets_S1[-1] == len(rows) == len(call.weights_R)
    assert len(call.offsets_S1) == len(call.expert_ids_S) + 1
    assert not len(rows) or 0 <= rows.min() <= rows.max() < len(call.hidden_TH)
