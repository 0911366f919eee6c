"""Calls answered by compiled code: byte for byte what the ordinary way answers, and nothing that it would refuse."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from experts.errors import MeshError
from experts.ops.cpu_backend import CpuBackend
from experts.shard import ExpertShard
from experts.spec import ExpertCall, ExpertKey, ExpertSpec, ExpertWeights
from experts.wire.codec import decode_call, encode_call, encode_partial
from experts.wire.shared_memory import SegmentPool
from experts.wire.v1 import expert_pb2 as pb

SPECS = {
    "gated": ExpertSpec(hidden_size=48, intermediate_size=40),
    "plain, biased": ExpertSpec(hidden_size=32, intermediate_size=64, activation="relu", gated=False, bias=True),
    "clamped": ExpertSpec(hidden_size=40, intermediate_size=32, bias=True, limit=0.5, up_shift=1.0),
}


def weights_of(spec: ExpertSpec, generator: torch.Generator) -> ExpertWeights:
    up = spec.intermediate_size * (2 if spec.gated else 1)
    return ExpertWeights(
        up_2IH=torch.randn(up, spec.hidden_size, generator=generator).bfloat16(),
        down_HI=torch.randn(spec.hidden_size, spec.intermediate_size, generator=generator).bfloat16(),
        up_bias_2I=torch.randn(up, generator=generator) if spec.bias else None,
        down_bias_H=torch.randn(spec.hidden_size, generator=generator) if spec.bias else None,
    )


def make_shard(spec: ExpertSpec, keys: list[ExpertKey], **options: object) -> ExpertShard:
    shard = ExpertShard(spec, CpuBackend(spec, **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for key in keys:
        shard.load(key, weights_of(spec, generator), checksum=0)
    return shard


def make_call(hidden: int, rows: dict[int, list[int]], num_tokens: int, layer: int = 1) -> ExpertCall:
    """rows: expert -> tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    offsets = [0]
    for tokens in rows.values():
        offsets.append(offsets[-1] + len(tokens))
    return ExpertCall(
        layer=layer,
        hidden_TH=torch.randn(num_tokens, hidden, generator=generator),
        expert_ids_S=torch.tensor(list(rows), dtype=torch.int32),
        offsets_S1=torch.tensor(offsets, dtype=torch.int32),
        token_rows_R=torch.tensor([token for tokens in rows.values() for token in tokens], dtype=torch.int32),
        weights_R=torch.rand(offsets[-1], generator=generator),
    )


def ordinary(shard: ExpertShard, request: bytes) -> bytes:
    wire = decode_call(request)
    assert isinstance(wire.call, ExpertCall)
    return encode_partial(wire.call_id, shard.forward(wire.call), wire.reply_dtype)


KEYS = [ExpertKey(layer, expert) for layer in (0, 1, 4) for expert in (0, 2, 3, 9)]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", SPECS)
def test_the_answer_is_the_ordinary_one(name: str, quantization: str) -> None:
    spec = SPECS[name]
    shard = make_shard(spec, KEYS, quantization=quantization)
    calls = [
        make_call(spec.hidden_size, {0: [0]}, 1),
        make_call(spec.hidden_size, {2: [1, 2], 3: [0], 9: [0, 1, 2]}, 3, layer=4),
        make_call(spec.hidden_size, {0: [], 3: list(range(150))}, 160, layer=0),
    ]
    for call_id, call in enumerate([*calls, *calls]):  # what one leaves behind is not in the next
        request = encode_call(call, call_id << 20)
        answer = shard.answer(request)
        assert answer is not None
        assert answer.num_rows == len(call.token_rows_R)
        assert answer.reply == ordinary(shard, request)
        again = pb.ForwardRequest.FromString(request).SerializeToString()  # protobuf's own order of fields
        assert shard.answer(again) == answer


def test_what_is_no_small_call_in_float32_is_left_to_other_code() -> None:
    spec = SPECS["gated"]
    shard = make_shard(spec, KEYS)
    call = make_call(spec.hidden_size, {0: [0], 2: [1]}, 2)
    good = encode_call(call, 7)
    assert shard.answer(good) is not None
    segments = SegmentPool()
    segment = segments.take(1 << 16)
    assert segment is not None
    messages = {
        "bfloat16 in": encode_call(call, hidden_dtype=torch.bfloat16),
        "float8 in": encode_call(call, hidden_dtype=torch.float8_e4m3fn),
        "bfloat16 out": encode_call(call, reply_dtype=torch.bfloat16),
        "in shared memory": encode_call(call, segment=segment),
        "another width": encode_call(make_call(spec.hidden_size + 1, {0: [0]}, 1)),
        "an expert that is not here": encode_call(make_call(spec.hidden_size, {1: [0]}, 1)),
        "an expert beyond all": encode_call(make_call(spec.hidden_size, {4096: [0]}, 1)),
        "a layer that is not here": encode_call(make_call(spec.hidden_size, {0: [0]}, 1, layer=2)),
        "a layer beyond all": encode_call(make_call(spec.hidden_size, {0: [0]}, 1, layer=70)),
        "many rows": encode_call(make_call(spec.hidden_size, {0: [0] * 161}, 1)),
        "many tokens": encode_call(make_call(spec.hidden_size, {0: [0]}, 161)),
        "no rows": encode_call(make_call(spec.hidden_size, {}, 1)),
        "cut off": good[:-1],
        "a field twice": good + good[:4],
        "an unknown field": good + bytes([14 << 3, 1]),
        "a field's number in more bytes than protobuf takes": bytes([0x88, 0x80, 0x80, 0x80, 0x80, 0x00, 7]) + good,
        "nothing": b"",
    }
    for why, message in messages.items():
        assert shard.answer(message) is None, why
    segments.close()
    shard.free(ExpertKey(1, 2))
    assert shard.answer(good) is None
    assert shard.answer(encode_call(make_call(spec.hidden_size, {0: [0]}, 1), 7)) is not None


def test_a_damaged_message_gets_the_ordinary_answer_or_none() -> None:
    spec = SPECS["gated"]
    shard = make_shard(spec, KEYS)
    chance = random.Random(5)
    good = encode_call(make_call(spec.hidden_size, {0: [0, 1], 3: [2]}, 3), 300)
    answered = 0
    for _ in range(4000):
        message = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            # Most of a message is hidden states: what is before them is what can be wrong.
            message[chance.randrange(min(len(message), 80))] = chance.randrange(256)
        if chance.random() < 0.2:
            del message[chance.randrange(len(message)) :]
        answer = shard.answer(bytes(message))
        if answer is None:
            continue
        answered += 1
        assert answer.reply == ordinary(shard, bytes(message))
        assert answer.num_rows == 3
    assert answered > 100


def test_with_several_threads_large_work_is_left_to_them() -> None:
    spec = ExpertSpec(hidden_size=512, intermediate_size=1024)
    shard = make_shard(spec, [ExpertKey(0, expert) for expert in range(6)], num_threads=2)
    assert shard.answer(encode_call(make_call(512, {0: [0]}, 1, layer=0))) is not None
    assert shard.answer(encode_call(make_call(512, {expert: [0] for expert in range(6)}, 1, layer=0))) is None
    shard.free(ExpertKey(0, 5))  # the last one that was loaded
    assert shard.answer(encode_call(make_call(512, {0: [0]}, 1, layer=0))) is not None


def test_a_busy_shard_and_other_formats_are_left_alone() -> None:
    spec = SPECS["gated"]
    shard = make_shard(spec, KEYS)
    request = encode_call(make_call(spec.hidden_size, {0: [0]}, 1))
    with shard._running:
        answers: list[object] = []
        asking = threading.Thread(target=lambda: answers.append(shard.answer(request)))
        asking.start()
        asking.join(10)
    assert answers == [None]
    # Weights that are no bfloat16 numbers are kept in float32: compiled code for the others cannot read them.
    exact = torch.randn(2 * spec.intermediate_size, spec.hidden_size, dtype=torch.float64).float()
    shard.load(ExpertKey(1, 5), ExpertWeights(up_2IH=exact, down_HI=torch.zeros(spec.hidden_size, 40)), checksum=0)
    assert shard.answer(encode_call(make_call(spec.hidden_size, {5: [0]}, 1))) is None
    assert shard.answer(request) is not None


def test_no_answer_is_made_of_a_refused_call() -> None:
    spec = SPECS["gated"]
    shard = make_shard(spec, KEYS)
    call = make_call(spec.hidden_size, {0: [0], 2: [1]}, 2)
    for field, values in {
        "expert_ids": [2, 0],
        "offsets": [0, 2, 1],
        "token_rows": [0, 2],
    }.items():
        message = pb.ForwardRequest.FromString(encode_call(call))
        setattr(message, field, torch.tensor(values, dtype=torch.int32).numpy().tobytes())
        assert shard.answer(message.SerializeToString()) is None
        with pytest.raises(MeshError, match=field):
            decode_call(message.SerializeToString())


def test_a_way_that_breaks_leaves_the_call_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["gated"]
    shard = make_shard(spec, [])
    monkeypatch.setattr("experts.wire._numba.answer_call.compile_answer_call", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shard.load(ExpertKey(1, 0), weights_of(spec, torch.Generator()), checksum=0)
    assert shard.answer(encode_call(make_call(spec.hidden_size, {0: [0]}, 1))) is None
