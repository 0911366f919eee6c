import threading
from concurrent import futures

import grpc
import pytest
import torch

from experts.errors import ExpertNotResident, MeshError
from experts.spec import ExpertCall
from experts.wire.codec import BadCall, decode_call, encode_failure, encode_partial
from router_service.placement import GroupReplica


class Doubler:
    """A group of one layer 0 with experts 0 and 1, each worth weight * hidden."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)

    def answer(self, request):
        return None

    def forward(self, call):
        self.arrived.release()
        assert self.gate.wait(20)
        if call.layer == 99:
            raise RuntimeError("the device is gone")
        if call.layer != 0:
            raise ExpertNotResident(f"layer {call.layer} is not here", "layer")
        partial_TH = torch.zeros(call.hidden_TH.shape)
        partial_TH.index_add_(0, call.token_rows_R, call.weights_R[:, None] * call.hidden_TH[call.token_rows_R].float())
        return partial_TH


class Served:
    """A group behind `ExpertService.Stream`, as plainly as grpc allows: it takes no shared memory."""

    def __init__(self, group, port=0):
        def stream(messages, _context):
            for message in messages:
                try:
                    wire = decode_call(message)
                except BadCall as error:
                    yield encode_failure(error.call_id, error)
                    continue
                try:
                    yield encode_partial(wire.call_id, group.forward(wire.call))
                except (MeshError, RuntimeError) as error:
                    yield encode_failure(wire.call_id, error)

        handler = grpc.method_handlers_generic_handler(
            "expertmesh.experts.v1.ExpertService", {"Stream": grpc.stream_stream_rpc_method_handler(stream)}
        )
        self.server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 1 << 28),
                ("grpc.max_send_message_length", 1 << 28),
            ],
        )
        self.server.add_generic_rpc_handlers((handler,))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()

    def replica(self, group=0, start=0):
        return GroupReplica(group=group, replica=f"g{group}-{start}", node="n0", address=f"127.0.0.1:{self.port}")

    def kill(self):
        self.server.stop(None).wait(10)


@pytest.fixture
def serve_group():
    served = []

    def serve(group, port=0):
        served.append(Served(group, port))
        return served[-1]

    yield serve
    for each in served:
        each.kill()


@pytest.fixture
def doubler():
    return Doubler()


@pytest.fixture
def make_call():
    def make(hidden_TH, layer=0, weight=2.0):
        num_tokens = len(hidden_TH)
        return ExpertCall(
            layer=layer,
            hidden_TH=hidden_TH,
            expert_ids_S=torch.tensor([0, 1], dtype=torch.int32),
            offsets_S1=torch.tensor([0, num_tokens, num_tokens], dtype=torch.int32),
            token_rows_R=torch.arange(num_tokens, dtype=torch.int32),
            weights_R=torch.full((num_tokens,), weight),
        )

    return make
