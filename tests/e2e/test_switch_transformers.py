"""Switch Transformers, text to text: transformers runs the model, each MoE layer of it is a call to RouterService."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from experts.group import ExpertGroup
from experts.ops.cpu_backend import CpuBackend
from experts.server import ExpertServer
from experts.spec import ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from experts.wire.v1 import expert_pb2
from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.server import RouterServer
from router_service.transport.grpc_stream import GrpcTransport
from router_service.wire.v1 import router_pb2, router_pb2_grpc

NUM_GROUPS = 2


class RemoteLayer(nn.Module):
    """What stands where a layer's gate and experts were."""

    def __init__(self, stub: router_pb2_grpc.RouterServiceStub, layer: int) -> None:
        super().__init__()
        self.calls = 0
        self._stub = stub
        self._layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        rows = hidden.reshape(-1, hidden.shape[-1]).numpy()
        sent = expert_pb2.Tensor(dtype=expert_pb2.DTYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
        reply = self._stub.Forward(router_pb2.RouteRequest(layer=self._layer, hidden=sent), timeout=60)
        return torch.frombuffer(bytearray(reply.combined.data), dtype=torch.float32).view(hidden.shape)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with experts in encoder layers 1 and 3 and decoder layer 1."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=6,
        expert_capacity=1000,
        initializer_factor=5.0,
        decoder_start_token_id=0,
    )
    path = tmp_path_factory.mktemp("switch")
    SwitchTransformersForConditionalGeneration(config).save_pretrained(path)
    return path


def load(directory: Path) -> Any:
    return SwitchTransformersForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def sparse_layers(model: Any) -> dict[int, nn.Module]:
    """Our index of a layer -> the block around its MoE; decoder layers follow the encoder's."""
    found = {}
    for offset, stack in ((0, model.encoder), (model.config.num_layers, model.decoder)):
        for index, block in enumerate(stack.block):
            if block.layer[-1].is_sparse:
                found[offset + index] = block.layer[-1]
    return found


@pytest.fixture
def stub(directory: Path) -> Iterator[router_pb2_grpc.RouterServiceStub]:
    """RouterService over two groups, all of it over gRPC."""
    checkpoint = Checkpoint(directory)
    layout = describe_experts(checkpoint, checkpoint.config())
    holders = balanced(layout.experts_per_layer, NUM_GROUPS, nodes_of_groups=None)
    servers, replicas = [], []
    for number in range(NUM_GROUPS):
        group = ExpertGroup(number, layout.spec, CpuBackend(layout.spec))
        keys = [ExpertKey(layer, e) for layer, held in holders.items() for e, by in enumerate(held) if number in by]
        group.assign(layout, checkpoint, keys)
        servers.append(ExpertServer(group))
        servers[-1].start()
        replicas.append(GroupReplica(group=number, replica=f"g{number}", node="here", address=servers[-1].address))
    spec = gate_spec_from_config(checkpoint.config())
    assert spec is not None
    gates = {
        layer: build_gate(spec, block.mlp.router.classifier.weight.detach(), None)
        for layer, block in sparse_layers(load(directory)).items()
    }
    assert sorted(gates) == sorted(layout.experts_per_layer) == [1, 3, 5]
    router = Router(GrpcTransport(), gates, recovery_timeout_s=10)
    router.update(PlacementTable(version=1, num_groups=NUM_GROUPS, holders=holders, replicas=tuple(replicas)))
    service = RouterServer(router)
    service.start()
    with grpc.insecure_channel(service.address) as channel:
        yield router_pb2_grpc.RouterServiceStub(channel)
    service.stop(0)
    router.close()
    for server in servers:
        server.stop(0)


@torch.inference_mode()
def test_text_to_text_equals_transformers(directory: Path, stub: router_pb2_grpc.RouterServiceStub) -> None:
    theirs, ours = load(directory), load(directory)
    remote = {}
    for layer, block in sparse_layers(ours).items():
        block.mlp = remote[layer] = RemoteLayer(stub, layer)
    assert not [name for name, _ in ours.named_parameters() if ".experts." in name]
    source = torch.randint(2, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    target = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    expected = theirs(input_ids=source, decoder_input_ids=target).logits
    logits = ours(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(
        ours.generate(source, max_new_tokens=12, do_sample=False),
        theirs.generate(source, max_new_tokens=12, do_sample=False),
    )
    assert all(layer.calls > 1 for layer in remote.values())
