"""ExpertService over a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from experts.errors import ConfigError, ExpertNotResident, RequestError
from experts.group import ExpertGroup
from experts.server import SERVICE, ExpertServer
from experts.spec import ExpertCall
from experts.wire.codec import decode_partial, encode_call
from experts.wire.v1 import expert_pb2 as pb
from experts.wire.v1.expert_pb2_grpc import ExpertServiceStub

HIDDEN = 32


@pytest.fixture
def channel(server: ExpertServer) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as channel:
        yield channel


def make_call(num_tokens: int = 3, layer: int = 0, expert: int = 1, hidden: int = HIDDEN) -> ExpertCall:
    return ExpertCall(
        layer=layer,
        hidden_TH=torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(num_tokens)),
        expert_ids_S=torch.tensor([expert], dtype=torch.int32),
        offsets_S1=torch.tensor([0, num_tokens], dtype=torch.int32),
        token_rows_R=torch.arange(num_tokens, dtype=torch.int32),
        weights_R=torch.ones(num_tokens),
    )


def test_a_generated_client_gets_what_the_group_computes(loaded_group: ExpertGroup, channel: grpc.Channel) -> None:
    call = make_call()
    reply = ExpertServiceStub(channel).Forward(pb.ForwardRequest.FromString(encode_call(call, 4)))
    assert reply.call_id == 4
    got = decode_partial(reply.SerializeToString()).partial_TH
    assert got is not None
    torch.testing.assert_close(got, loaded_group.forward(call), rtol=0, atol=0)


def test_a_stream_answers_in_order_and_outlives_bad_calls(loaded_group: ExpertGroup, channel: grpc.Channel) -> None:
    stream = channel.stream_stream(f"/{SERVICE}/Stream")
    good = [make_call(n) for n in (1, 5, 4000)]
    requests = [
        encode_call(good[0], 1),
        encode_call(make_call(expert=77), 2),
        encode_call(good[1], 3, reply_dtype=torch.bfloat16),
        encode_call(make_call(hidden=HIDDEN + 1), 4),
        b"\xff\xff",
        encode_call(make_call(layer=99), 6),
        encode_call(good[2], 7),
    ]
    replies = [decode_partial(data) for data in stream(iter(requests))]
    assert [reply.call_id for reply in replies] == [1, 2, 3, 4, 0, 6, 7]
    assert type(replies[1].error) is ExpertNotResident
    assert "expert 77 of layer 0" in str(replies[1].error)
    assert type(replies[3].error) is RequestError
    assert str(replies[3].error).startswith("hidden.shape: ")
    assert str(replies[4].error).startswith("message: ")
    assert type(replies[5].error) is ExpertNotResident
    for reply, call in zip((replies[0], replies[6]), (good[0], good[2]), strict=True):
        assert reply.partial_TH is not None
        torch.testing.assert_close(reply.partial_TH, loaded_group.forward(call), rtol=1e-5, atol=1e-6)
    assert replies[2].partial_TH is not None
    torch.testing.assert_close(replies[2].partial_TH, loaded_group.forward(good[1]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "code", "start"),
    [
        (make_call(hidden=5), grpc.StatusCode.INVALID_ARGUMENT, "hidden.shape: rows of 5 values"),
        (make_call(expert=9), grpc.StatusCode.NOT_FOUND, "expert_ids: expert 9 of layer 0"),
    ],
)
def test_unary_errors_have_a_code_and_name_the_field(
    channel: grpc.Channel, call: ExpertCall, code: grpc.StatusCode, start: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Forward")(encode_call(call))
    assert caught.value.code() is code
    assert caught.value.details().startswith(start)


def test_describe_lists_slots_with_their_checksums(loaded_group: ExpertGroup, channel: grpc.Channel) -> None:
    reply = ExpertServiceStub(channel).Describe(pb.DescribeRequest())
    assert (reply.group, reply.device, reply.hidden_size) == (2, "cpu", HIDDEN)
    checksums = {(slot.layer, slot.expert): slot.checksum for slot in reply.slots}
    assert checksums == dict(loaded_group.describe().checksums)
    assert checksums


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICE in database.get_services()
    assert database.FindFileContainingSymbol(SERVICE).package == "expertmesh.experts.v1"


def test_stopping_tells_watchers_and_finishes_what_is_being_computed(
    loaded_group: ExpertGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()
    forward = loaded_group.forward

    def slow_forward(call: ExpertCall) -> torch.Tensor:
        entered.set()
        assert release.wait(30)
        return forward(call)

    monkeypatch.setattr(loaded_group, "forward", slow_forward)
    monkeypatch.setattr(loaded_group, "answer", lambda request: None)  # so that `forward` is asked
    server = ExpertServer(loaded_group)
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        more = threading.Event()

        def requests() -> Iterator[bytes]:
            yield encode_call(make_call(), 1)
            more.wait(30)

        replies = channel.stream_stream(f"/{SERVICE}/Stream")(requests())
        assert entered.wait(30)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        release.set()
        assert decode_partial(next(replies)).partial_TH is not None
        with pytest.raises(grpc.RpcError):
            next(replies)
        stopping.join(30)
        assert not stopping.is_alive()
        more.set()


def test_a_taken_port_is_a_clear_error(server: ExpertServer, loaded_group: ExpertGroup) -> None:
    host, port = server.address.split(":")
    with pytest.raises(ConfigError, match=f"cannot listen on {server.address}; is the port taken"):
        ExpertServer(loaded_group, host, int(port))
