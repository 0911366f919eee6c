import math

import numpy as np
import pytest
import torch

from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.node_limit import NodeLimit
from router_service.router import Router

SPEC = GateSpec(system="qwen3_moe", num_experts=16, num_experts_per_tok=4)


def deepseek_v2(scores, held_EN, max_nodes, top_k):
    """The paper's words for one token: the M devices with the highest scores, then the top K on them; more devices
    where these have fewer than K that the gate allows."""
    nodes_of = [set(np.flatnonzero(held_N).tolist()) for held_N in held_EN]
    best = [
        max(score for score, nodes in zip(scores, nodes_of, strict=True) if n in nodes) for n in range(held_EN.shape[1])
    ]
    ranked = sorted(range(len(best)), key=lambda node: -best[node])
    for count in range(max_nodes, len(best) + 1):
        eligible = [e for e, nodes in enumerate(nodes_of) if nodes & set(ranked[:count]) and scores[e] > -math.inf]
        if len(eligible) >= top_k:
            break
    return set(sorted(eligible, key=lambda expert: -scores[expert])[:top_k])


def test_chooses_as_the_paper_says():
    torch.manual_seed(0)
    held_EN = np.eye(4, dtype=bool)[[expert // 4 for expert in range(16)]]
    gate = build_gate(SPEC, torch.randn(16, 8), None)
    hidden_TH = torch.randn(200, 8)
    seen = []
    gate(hidden_TH, lambda choice_TE, top_k: seen.append(choice_TE) or choice_TE)
    for max_nodes in (1, 2, 3):
        ids_TK = gate(hidden_TH, NodeLimit(held_EN, max_nodes)).expert_ids_TK
        for ids, scores in zip(ids_TK.tolist(), seen[0].tolist(), strict=True):
            assert set(ids) == deepseek_v2(scores, held_EN, max_nodes, 4)
    unlimited = gate(hidden_TH, NodeLimit(held_EN, 4))
    assert torch.equal(unlimited.expert_ids_TK, gate(hidden_TH).expert_ids_TK)


def test_opens_further_nodes_where_the_best_hold_too_few_experts():
    """Mixtral on 8 nodes: an expert each, and a token needs two."""
    torch.manual_seed(0)
    gate = build_gate(GateSpec(system="mixtral", num_experts=8, num_experts_per_tok=2), torch.randn(8, 8), None)
    hidden_TH = torch.randn(200, 8)
    limited = gate(hidden_TH, NodeLimit(np.eye(8, dtype=bool), 1))
    assert all(
        torch.equal(a, b) for a, b in zip(limited, gate(hidden_TH, NodeLimit(np.eye(8, dtype=bool), 8)), strict=True)
    )


@pytest.mark.parametrize("system", ["deepseek_v2", "deepseek_v3"])
def test_opens_further_nodes_where_the_gate_closed_the_experts_of_the_best(system):
    """A node has an expert of each gate group, some a second one: two or three that the gate allows, of four."""
    spec = GateSpec(system=system, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    gate = build_gate(spec, torch.randn(16, 8), torch.zeros(16) if system == "deepseek_v3" else None)
    hidden_TH = torch.randn(100, 8)
    seen = []
    gate(hidden_TH, lambda choice_TE, top_k: seen.append(choice_TE) or choice_TE)
    held_EN = np.eye(4, dtype=bool)[np.arange(16) % 4]
    held_EN[rng.choice(16, 4, replace=False), rng.integers(0, 4, 4)] = True
    for max_nodes in (1, 2, 3):
        ids_TK = gate(hidden_TH, NodeLimit(held_EN, max_nodes)).expert_ids_TK
        for ids, scores in zip(ids_TK.tolist(), seen[0].tolist(), strict=True):
            assert set(ids) == deepseek_v2(scores, held_EN, max_nodes, 4)
            assert min(scores[expert] for expert in ids) > -math.inf


def test_the_router_restricts_route_and_not_dispatch(make_mesh):
    mesh = make_mesh(nodes=["a", "b", "c", "d"])
    gate = build_gate(SPEC, torch.randn(16, 8), None)
    router = Router(
        mesh.transport,
        {0: gate},
        recovery_timeout_s=1.0,
        node="elsewhere",
        max_nodes_per_token=2,
        node_limit_mode="restrict",
    )
    router.update(mesh.table)
    hidden_TH = torch.randn(100, 8)
    out = router.route(0, hidden_TH).result()
    assert router.counters.token_nodes <= 200
    held_EN = np.eye(4, dtype=bool)[[holders[0] for holders in mesh.table.holders[0]]]
    expected = mesh.experts.reference(hidden_TH, *gate(hidden_TH, NodeLimit(held_EN, 2)))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    chosen = gate(hidden_TH)
    free = router.dispatch(0, hidden_TH, *chosen).result()
    torch.testing.assert_close(free.double(), mesh.experts.reference(hidden_TH, *chosen), atol=1e-5, rtol=1e-5)


def test_native_groups_on_nodes_limit_the_nodes(make_mesh):
    """DeepSeek-V3's pattern: 8 gate groups on 8 nodes, a token in at most 4."""
    mesh = make_mesh(num_experts=64, num_groups=8, nodes=[f"n{7 - group}" for group in range(8)])
    spec = GateSpec(
        system="deepseek_v3", num_experts=64, num_experts_per_tok=8, norm_topk_prob=True, n_group=8, topk_group=4
    )
    gate = build_gate(spec, torch.randn(64, 8), torch.zeros(64))
    router = Router(mesh.transport, {0: gate}, recovery_timeout_s=1.0, node="elsewhere")
    router.update(mesh.table)
    router.route(0, torch.randn(100, 8)).result()
    assert 100 < router.counters.token_nodes <= 400
