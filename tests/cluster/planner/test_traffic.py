from __future__ import annotations

import pytest

from cluster.planner.models import find_model
from cluster.planner.split import Split
from cluster.planner.traffic import plan_traffic, wire_row_bytes


def split(nodes: int, engine_gpus: int, experts: int = 256) -> Split:
    return Split(
        nodes=nodes,
        gpus_per_node=8,
        num_experts=experts,
        engine_gpus=engine_gpus,
        groups=nodes * 8 - engine_gpus,
        group_replicas=1,
    )


def test_a_row_on_the_wire() -> None:
    deepseek = find_model("deepseek-v3").architecture
    assert wire_row_bytes(deepseek, "model") == wire_row_bytes(deepseek, "bf16") == 2 * 7168
    assert wire_row_bytes(deepseek, "fp8") == 7168 + 4 * 56


def test_bytes_are_nodes_times_a_row_each_way() -> None:
    deepseek = find_model("deepseek-v3").architecture
    traffic = plan_traffic(deepseek, split(5, 8), "bf16")
    assert traffic.dispatch_bytes == traffic.combine_bytes == traffic.nodes * 14336
    assert traffic.remote_nodes == traffic.nodes
    narrow = plan_traffic(deepseek, split(5, 8), "fp8")
    assert narrow.dispatch_bytes == traffic.nodes * 7392
    assert narrow.combine_bytes == traffic.combine_bytes


def test_experts_beside_the_engine_cross_nothing() -> None:
    deepseek = find_model("deepseek-v3").architecture
    alone = plan_traffic(deepseek, split(1, 2), "bf16")
    assert (alone.nodes, alone.remote_nodes, alone.remote_bytes) == (1.0, 0.0, 0.0)
    shared = plan_traffic(find_model("kimi-k2").architecture, split(2, 4, experts=384), "bf16")
    assert shared.nodes - 1 < shared.remote_nodes < shared.nodes
    # Node 1 has 4 of 12 groups, a third of the experts: it is missed where all 8 are among the others.
    assert shared.nodes - shared.remote_nodes == pytest.approx(1 - (2 / 3) ** 8, abs=0.01)
