from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cluster.planner.nodes_touched import Holders, expected_nodes, touch_probabilities
from router_service.placement import balanced


def placed(experts: int, groups_on_node: tuple[int, ...], copies: int) -> Holders:
    """The nodes of each expert under balanced placement."""
    node_of = [node for node, groups in enumerate(groups_on_node) for _ in range(groups)]
    names = [str(node) for node in node_of]
    holders = balanced({0: experts}, len(names), nodes_of_groups=names, num_redundant_experts=copies)[0]
    return tuple(tuple(sorted({node_of[group] for group in held})) for held in holders)


def drawn_nodes(
    holders: Holders, experts_per_token: int, num_groups: int = 1, topk_group: int = 1, draws: int = 20_000
) -> float:
    """Monte Carlo: draw gate groups, then experts; the fewest nodes that cover them, by trying every set of nodes."""
    rng = np.random.default_rng(0)
    num_nodes = max(max(held) for held in holders) + 1
    on_node_EN = np.array([[node in held for node in range(num_nodes)] for held in holders])
    size = len(holders) // num_groups
    groups_TG = rng.random((draws, num_groups)).argsort(axis=1)[:, :topk_group]
    experts_TX = (groups_TG[:, :, None] * size + np.arange(size)).reshape(draws, -1)
    order_TK = rng.random(experts_TX.shape).argsort(axis=1)[:, :experts_per_token]
    chosen_TKN = on_node_EN[np.take_along_axis(experts_TX, order_TK, axis=1)]
    if all(len(held) == 1 for held in holders):
        return float(chosen_TKN.any(axis=1).sum(axis=1).mean())
    fewest_T = np.full(draws, num_nodes)
    for count in range(num_nodes - 1, 0, -1):
        for nodes in combinations(range(num_nodes), count):
            fewest_T[chosen_TKN[:, :, nodes].any(axis=2).all(axis=1)] = count
    return float(fewest_T.mean())


@pytest.mark.parametrize(
    ("experts", "per_token", "gate_groups", "topk_group", "groups_on_node"),
    [
        (256, 8, 8, 4, (8,) * 2),
        (256, 8, 8, 4, (8,) * 4),
        (256, 8, 8, 4, (8,) * 8),
        (256, 8, 8, 4, (8,) * 3),  # groups straddle nodes
        (160, 6, 8, 3, (8,) * 4),
        (384, 8, 1, 1, (8,) * 4),
        (8, 2, 1, 1, (3, 3, 2)),
        (128, 8, 1, 1, (8, 5)),
    ],
)
def test_without_copies(
    experts: int, per_token: int, gate_groups: int, topk_group: int, groups_on_node: tuple[int, ...]
) -> None:
    draw = (placed(experts, groups_on_node, 0), per_token, gate_groups, topk_group)
    assert expected_nodes(*draw) == pytest.approx(drawn_nodes(*draw), abs=0.03)
    assert sum(touch_probabilities(*draw)) == pytest.approx(expected_nodes(*draw))


@pytest.mark.parametrize(
    ("experts", "per_token", "gate_groups", "topk_group", "nodes", "copies"),
    [(8, 2, 1, 1, 2, 4), (64, 6, 1, 1, 4, 32), (32, 4, 4, 2, 4, 16), (16, 4, 1, 1, 3, 16), (8, 2, 1, 1, 2, 8)],
)
def test_with_copies_the_fewest_nodes_are_exact_up_to_four(
    experts: int, per_token: int, gate_groups: int, topk_group: int, nodes: int, copies: int
) -> None:
    draw = (placed(experts, (2,) * nodes, copies), per_token, gate_groups, topk_group)
    assert expected_nodes(*draw) == pytest.approx(drawn_nodes(*draw), abs=0.03)


def test_with_copies_on_more_nodes_it_is_a_close_upper_bound() -> None:
    draw = (placed(256, (8,) * 6, 32), 8)
    drawn = drawn_nodes(*draw, draws=4000)
    assert drawn - 0.03 <= expected_nodes(*draw) <= 1.06 * drawn
    assert expected_nodes(*draw) <= expected_nodes(placed(256, (8,) * 6, 0), 8)


def test_all_on_one_node_is_one() -> None:
    assert expected_nodes(placed(64, (8,), 0), 6) == 1.0


def test_aligned_gate_groups_bound_the_nodes() -> None:
    assert expected_nodes(placed(256, (8,) * 8, 0), 8, 8, 4) <= 4.0 < expected_nodes(placed(256, (8,) * 8, 0), 8)
