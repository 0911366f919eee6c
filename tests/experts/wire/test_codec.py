"""Calls survive the wire; bytes made by protobuf's own classes are read alike; bad ones name their field."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from experts.errors import ExpertNotResident, MeshError, RequestError
from experts.spec import ExpertCall
from experts.wire import codec
from experts.wire.codec import (
    MAX_EXPERTS,
    BadCall,
    decode_call,
    decode_partial,
    encode_call,
    encode_failure,
    encode_partial,
)
from experts.wire.v1 import expert_pb2 as pb


def make_call(dtype: torch.dtype = torch.float32, num_tokens: int = 3, hidden: int = 200) -> ExpertCall:
    generator = torch.Generator().manual_seed(0)
    return ExpertCall(
        layer=7,
        hidden_TH=torch.randn(num_tokens, hidden, generator=generator).to(dtype),
        expert_ids_S=torch.tensor([2, 5], dtype=torch.int32),
        offsets_S1=torch.tensor([0, 1, 4], dtype=torch.int32),
        token_rows_R=torch.tensor([1, 0, 1, 2], dtype=torch.int32),
        weights_R=torch.tensor([0.5, 1.0, 0.25, 0.125]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_call_round_trip_is_exact(dtype: torch.dtype) -> None:
    call = make_call(dtype)
    got = decode_call(encode_call(call, 12, reply_dtype=torch.bfloat16))
    assert got.call_id == 12
    assert got.reply_dtype is torch.bfloat16
    assert got.call.layer == 7
    for name in ("hidden_TH", "expert_ids_S", "offsets_S1", "token_rows_R", "weights_R"):
        torch.testing.assert_close(getattr(got.call, name), getattr(call, name), rtol=0, atol=0)


def test_bytes_are_ordinary_protobuf() -> None:
    call = make_call()
    request = pb.ForwardRequest.FromString(encode_call(call, 3))
    assert (request.call_id, request.layer, list(request.hidden.shape)) == (3, 7, [3, 200])
    assert request.hidden.data == call.hidden_TH.numpy().tobytes()
    again = decode_call(request.SerializeToString())
    torch.testing.assert_close(again.call.hidden_TH, call.hidden_TH, rtol=0, atol=0)
    reply = pb.ForwardReply.FromString(encode_partial(9, call.hidden_TH))
    assert reply.call_id == 9
    assert not reply.HasField("failure")
    got = decode_partial(reply.SerializeToString()).partial_TH
    assert got is not None
    torch.testing.assert_close(got, call.hidden_TH, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 3, 70, 300])
@pytest.mark.parametrize("call_id", [0, 1, 127, 128, 1 << 40])
def test_compiled_code_writes_what_protobuf_does(tokens: int, call_id: int) -> None:
    call = dataclasses.replace(make_call(), hidden_TH=torch.randn(tokens, 200))
    for layer in (0, 300):
        message = encode_call(dataclasses.replace(call, layer=layer), call_id)
        assert message == pb.ForwardRequest.FromString(message).SerializeToString()
    message = encode_partial(call_id, call.hidden_TH)
    assert message == pb.ForwardReply.FromString(message).SerializeToString()


def test_compiled_code_reads_what_protobuf_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(5)
    messages = [encode_partial(call_id, torch.randn(shape)) for call_id, shape in ((0, (1, 3)), (1 << 20, (5, 9)))]
    messages += [encode_partial(3, torch.randn(2, 4), torch.bfloat16), encode_partial(3, torch.randn(0, 4))]
    messages += [encode_failure(8, RequestError("no")), b""]
    for message in messages[:2] * 400:
        changed = bytearray(message)
        for _ in range(generator.randrange(1, 3)):
            changed[generator.randrange(min(14, len(changed)))] = generator.randrange(256)
        messages.append(
            bytes(changed[: generator.randrange(1, len(changed) + 1)] if generator.random() < 0.3 else changed)
        )

    def read(message: bytes) -> object:
        try:
            reply = decode_partial(message)
        except RequestError as error:
            return str(error)
        shape = None if reply.partial_TH is None else reply.partial_TH.shape
        values = None if reply.partial_TH is None else reply.partial_TH.numpy().tobytes()
        return reply.call_id, shape, values, str(reply.error)

    compiled = [read(message) for message in messages]
    monkeypatch.setattr(codec, "compiled_reader", lambda: lambda *_: False)
    assert compiled == [read(message) for message in messages]


@pytest.mark.parametrize(("dtype", "root_mean_square"), [(torch.bfloat16, 0.00166), (torch.float8_e4m3fn, 0.0257)])
def test_narrow_dtypes_lose_what_the_documents_say(dtype: torch.dtype, root_mean_square: float) -> None:
    call = make_call(num_tokens=400, hidden=512)
    error = decode_call(encode_call(call, hidden_dtype=dtype)).call.hidden_TH.float() - call.hidden_TH
    assert float(error.norm() / call.hidden_TH.norm()) == pytest.approx(root_mean_square, rel=0.02)


def test_float8_keeps_the_documented_error_and_flushes_what_is_far_below_its_block() -> None:
    call = make_call(num_tokens=400)
    call.hidden_TH[:, ::10] *= 1e-6
    got = decode_call(encode_call(call, hidden_dtype=torch.float8_e4m3fn)).call.hidden_TH
    assert got.dtype is torch.float32
    largest = torch.nn.functional.pad(call.hidden_TH, (0, 56)).view(400, 2, 128).abs().amax(2)
    smallest = (largest / 458752).repeat_interleave(128, 1)[:, :200]
    allowed = torch.maximum(call.hidden_TH.abs() * 2**-4, smallest)
    # float32's own rounding of scale and product
    assert ((got - call.hidden_TH).abs() <= allowed * (1 + 1e-5)).all()
    flushed = call.hidden_TH.abs() < smallest * (1 - 1e-5)
    assert flushed.any()
    assert not got[flushed].any()


def test_a_non_contiguous_tensor_travels_row_major() -> None:
    wide = torch.randn(8, 6)
    got = decode_partial(encode_partial(0, wide.t())).partial_TH
    assert got is not None
    torch.testing.assert_close(got, wide.t(), rtol=0, atol=0)


def test_an_empty_call_travels() -> None:
    call = ExpertCall(
        layer=0,
        hidden_TH=torch.empty(0, 16),
        expert_ids_S=torch.empty(0, dtype=torch.int32),
        offsets_S1=torch.zeros(1, dtype=torch.int32),
        token_rows_R=torch.empty(0, dtype=torch.int32),
        weights_R=torch.empty(0),
    )
    assert decode_call(encode_call(call)).call.hidden_TH.shape == (0, 16)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("expert_ids", lambda m: setattr(m, "expert_ids", m.expert_ids[:-1])),
        ("expert_ids", lambda m: setattr(m, "expert_ids", m.expert_ids[4:] + m.expert_ids[:4])),
        ("offsets", lambda m: setattr(m, "offsets", m.offsets[:-4])),
        ("offsets", lambda m: setattr(m, "offsets", m.offsets[:-4] + b"\x09\0\0\0")),
        ("token_rows", lambda m: setattr(m, "token_rows", m.token_rows[:-4] + b"\x03\0\0\0")),
        ("token_rows", lambda m: setattr(m, "token_rows", m.token_rows[:-4] + b"\xff\xff\xff\xff")),
        (
            "token_rows",
            lambda m: (setattr(m, "offsets", m.offsets[:-4] + b"\x07\0\0\0"), setattr(m, "token_rows", bytes(28))),
        ),
        ("weights", lambda m: setattr(m, "weights", b"")),
        ("reply_dtype", lambda m: setattr(m, "reply_dtype", 77)),
        ("hidden.dtype", lambda m: setattr(m.hidden, "dtype", 0)),
        ("hidden.data", lambda m: setattr(m.hidden, "data", m.hidden.data[:-1])),
        ("hidden.shape", lambda m: m.hidden.shape.append(1)),
        ("hidden.scales", lambda m: (setattr(m.hidden, "dtype", 4), setattr(m.hidden, "data", bytes(600)))),
    ],
)
def test_a_bad_field_is_named_and_the_call_known(field: str, change: object) -> None:
    request = pb.ForwardRequest.FromString(encode_call(make_call(), 41))
    assert callable(change)
    change(request)
    with pytest.raises(BadCall, match=f"^{field}: ") as caught:
        decode_call(request.SerializeToString())
    assert (caught.value.field, caught.value.call_id) == (field, 41)


@pytest.mark.parametrize("data", [b"\x0f", b"\xff" * 20, b"\x7a\xff", encode_call(make_call())[:-5]])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(RequestError, match=r"^message: "):
        decode_call(data)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ExpertNotResident("layer 3 expert 4"), ExpertNotResident),
        (RequestError("hidden.shape: wrong"), RequestError),
        (RuntimeError("out of memory"), MeshError),
    ],
)
def test_failures_come_back_as_errors(raised: Exception, expected: type[MeshError]) -> None:
    reply = decode_partial(encode_failure(5, raised))
    assert reply.call_id == 5
    assert reply.partial_TH is None
    assert type(reply.error) is expected
    assert str(raised) in str(reply.error)


def test_more_experts_than_any_layer_has_are_refused_before_they_are_looked_at() -> None:
    count = MAX_EXPERTS + 1
    request = pb.ForwardRequest(
        call_id=4,
        expert_ids=np.arange(count, dtype=np.int32).tobytes(),
        offsets=np.zeros(count + 1, np.int32).tobytes(),
        hidden=pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[0, 8]),
    )
    with pytest.raises(BadCall, match=r"^expert_ids: 65537 experts; no layer has over 65536"):
        decode_call(request.SerializeToString())
