import itertools

import numpy as np
import pytest
import torch

from router_service.dispatch import plan_dispatch
from router_service.node_cover import NodeCover
from router_service.router import Router
from router_service.slot_index import build_slot_index


def random_problem(num_experts, num_groups, most, num_tokens, top_k, seed=0):
    rng = np.random.default_rng(seed)
    holders = [
        tuple(sorted(rng.choice(num_groups, rng.integers(1, most + 1), replace=False).tolist()))
        for _ in range(num_experts)
    ]
    ids_TK = np.stack([rng.choice(num_experts, top_k, replace=False) for _ in range(num_tokens)])
    return holders, build_slot_index(holders, num_groups), ids_TK


def fewest(sets):
    """Least number of nodes that meets every set, by trying all."""
    nodes = sorted(set().union(*sets))
    for size in range(len(nodes) + 1):
        for pick in itertools.combinations(nodes, size):
            if all(set(pick) & each for each in sets):
                return size
    raise AssertionError


@pytest.mark.parametrize(("num_groups", "most"), [(4, 2), (8, 2), (8, 3), (8, 4)])
def test_as_few_nodes_as_trying_everything_finds(num_groups, most):
    used = best = 0
    for seed in range(12):
        # 10 tokens stay below the load bound.
        holders, index, ids_TK = random_problem(32, num_groups, most, 10, 6, seed)
        # One group a node.
        slot_TK = NodeCover(index, np.arange(num_groups, dtype=np.int32), None)(ids_TK)
        for ids, slots in zip(ids_TK, slot_TK, strict=True):
            assert (index.expert_of_slot_S[slots] == ids).all()
            nodes = {int(node) for node in index.group_of_slot_S[slots]}
            least = fewest([set(holders[expert]) for expert in ids])
            assert least <= len(nodes) <= least + 1
            used, best = used + len(nodes), best + least
    assert used <= 1.02 * best


def test_the_local_node_is_free_and_no_expert_is_nowhere():
    holders = [(0, 1), (0, 1), (1,), (0, 1)]
    index = build_slot_index(holders, 2)
    ids_TK = np.array([[0, 1], [0, 2], [3, -1]])
    for local in (0, 1):
        slot_TK = NodeCover(index, np.array([0, 1], dtype=np.int32), local)(ids_TK)
        groups = np.append(index.group_of_slot_S, -1)[slot_TK]
        assert groups[0].tolist() == [local, local]
        assert groups[1, 1] == 1
        assert groups[2].tolist() == [local, -1]


def test_load_stays_within_the_bound_where_replicas_allow():
    # Every expert everywhere: the cheapest cover would be one node for all.
    index = build_slot_index([tuple(range(4))] * 16, 4)
    rng = np.random.default_rng(0)
    ids_TK = np.stack([rng.choice(16, 4, replace=False) for _ in range(1000)])
    slot_TK = NodeCover(index, np.arange(4, dtype=np.int32), 0)(ids_TK)
    load = np.bincount(index.group_of_slot_S[slot_TK].reshape(-1), minlength=4)
    assert load.max() <= 1250
    assert (index.expert_of_slot_S[slot_TK] == ids_TK).all()


def test_plans_with_a_cover_ask_for_the_same_rows():
    _, index, ids_TK = random_problem(32, 4, 3, 50, 4)
    cover = NodeCover(index, np.arange(4, dtype=np.int32), None)
    rows = []
    for each in (None, cover):
        plan = plan_dispatch(index, 0, torch.from_numpy(ids_TK), torch.ones(50, 4), each)
        triples = [part.rows() for part in plan.parts]
        rows.append(
            sorted((int(t), int(e)) for experts, tokens, _ in triples for e, t in zip(experts, tokens, strict=True))
        )
    assert rows[0] == rows[1]


def test_fewer_copies_and_the_same_outputs(make_mesh):
    mesh = make_mesh(num_experts=24, num_groups=6, redundant=24, nodes=["a", "a", "b", "b", "c", "c"])
    batch = mesh.batch(60, top_k=6)
    outs, copies = [], []
    for limit in (None, 2):
        router = Router(mesh.transport, {}, recovery_timeout_s=1.0, node="elsewhere", max_nodes_per_token=limit)
        router.update(mesh.table)
        outs.append(router.dispatch(0, *batch).result())
        copies.append(router.counters.token_copies)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-6)
    assert copies[1] < copies[0]
