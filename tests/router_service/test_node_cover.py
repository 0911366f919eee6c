import itertools

import numpy as np
import pytest
import torch

from router_service.dispatch import plan_dispatch
from router_service.node_cover import NodeCover
from router_service.placement import balanced
from router_service.router import Router
from router_service.slot_index import build_slot_index
from router_service.transport.grpc_stream import GrpcTransport


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


def check_bound(index, ids_TK, slot_TK):
    """Most rows of a group by the bound, after a look that no row of a group beyond it could go to one with room."""
    num_groups = len(index.group_bounds_G1) - 1
    group_R = np.append(index.group_of_slot_S, num_groups)[slot_TK.reshape(-1)]
    load_G = np.bincount(group_R, minlength=num_groups + 1)[:num_groups]
    bound = max(64, int(np.ceil(1.25 * (ids_TK >= 0).sum() / num_groups)))
    for expert, group in set(zip(ids_TK.reshape(-1).tolist(), group_R.tolist(), strict=True)):
        if expert < 0:
            assert group == num_groups
            continue
        holders = index.group_of_slot_S[index.slots_of_expert_EJ[expert]]
        assert group in holders
        assert load_G[group] <= bound or load_G[holders].min() >= bound
    return load_G.max() / bound


def popular(rng, num_tokens, top_k, popularity_E):
    """Each token's K distinct experts at random, the popular ones more often."""
    rank_TE = np.log(popularity_E + 1e-30) + rng.gumbel(size=(num_tokens, len(popularity_E)))
    return np.argsort(-rank_TE, axis=1)[:, :top_k]


def test_load_stays_within_the_bound_with_few_redundant_experts():
    """DeepSeek-V3 on 8 nodes, of whose experts one in eight has a second slot: enough for uneven popularity."""
    nodes = [f"n{group}" for group in range(8)]
    index = build_slot_index(balanced({0: 256}, 8, nodes_of_groups=nodes, num_redundant_experts=32)[0], 8)
    cover = NodeCover(index, np.arange(8, dtype=np.int32), None)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids_TK = popular(rng, 2048, 8, rng.dirichlet(np.full(256, 5.0)))
        assert check_bound(index, ids_TK, cover(ids_TK)) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_no_row_stays_in_a_group_beyond_the_bound_that_another_could_take(seed):
    rng = np.random.default_rng(seed)
    num_groups = int(rng.integers(2, 17))
    num_experts = int(rng.integers(max(num_groups, 8), 129))
    top_k = int(rng.integers(1, 9))
    most = int(rng.integers(2, min(num_groups, 4) + 1))
    _, index, _ = random_problem(num_experts, num_groups, most, 1, 1, seed)
    node_of_group_G = rng.integers(0, rng.integers(1, num_groups + 1), num_groups).astype(np.int32)
    cover = NodeCover(index, node_of_group_G, int(node_of_group_G[0]) if rng.random() < 0.5 else None)
    ids_TK = popular(
        rng, int(rng.integers(1, 1500)), top_k, rng.dirichlet(np.full(num_experts, rng.choice([0.3, 2.0])))
    )
    ids_TK[rng.random(ids_TK.shape) < rng.choice([0, 0.1])] = -1
    check_bound(index, ids_TK, cover(ids_TK))


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


@pytest.fixture
def mesh(make_mesh):
    return make_mesh(num_experts=24, num_groups=6, redundant=24, nodes=["a", "a", "b", "b", "c", "c"])


@pytest.mark.parametrize("transport", ["in_process", "grpc"])
def test_fewer_copies_and_the_same_outputs(mesh, servers, transport):
    batch = mesh.batch(60, top_k=6)
    outs, copies = [], []
    for limit in (None, 2):
        way = mesh.transport if transport == "in_process" else GrpcTransport()
        router = Router(way, {}, recovery_timeout_s=10.0, node="elsewhere", max_nodes_per_token=limit)
        router.update(mesh.table if transport == "in_process" else servers.table())
        outs.append(router.dispatch(0, *batch).result())
        copies.append(router.counters.token_copies)
        router.close()
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outs[1].double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)
    assert copies[1] < copies[0]
