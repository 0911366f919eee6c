"""RouterService beside a served model: another process's MoE layer, and reflection as grpcurl uses it."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from transformers import AutoModelForCausalLM

from experts.wire.v1 import expert_pb2
from router_service.wire.v1 import router_pb2, router_pb2_grpc


@pytest.fixture
def service_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_another_process_runs_an_moe_layer(
    tiny_checkpoint: Callable[[str], Path], serve_here: Callable[[dict[str, Any]], str], service_port: int
) -> None:
    checkpoint = tiny_checkpoint("deepseek_v3")
    serve_here(
        {
            "model": {"source": str(checkpoint), "served_name": "tiny"},
            "experts": {"groups": 2},
            "router": {"service_port": service_port},
        }
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    block = model.model.layers[1].mlp
    hidden_TH = torch.randn(5, model.config.hidden_size)
    with torch.inference_mode():
        _, weights_TK, ids_TK = block.gate(hidden_TH)
        expected_TH = block.experts(hidden_TH, ids_TK, weights_TK)

    tensor = expert_pb2.Tensor(
        dtype=expert_pb2.DTYPE_FLOAT32, shape=hidden_TH.shape, data=hidden_TH.numpy().astype("<f4").tobytes()
    )
    with grpc.insecure_channel(f"127.0.0.1:{service_port}") as channel:
        reply = router_pb2_grpc.RouterServiceStub(channel).Forward(
            router_pb2.RouteRequest(layer=1, hidden=tensor), timeout=60
        )
        combined_TH = torch.frombuffer(bytearray(reply.combined.data), dtype=torch.float32).view(5, -1)
        assert torch.allclose(combined_TH, expected_TH, atol=1e-5)
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"expertmesh.router.v1.RouterService", "grpc.health.v1.Health"} <= set(services)
