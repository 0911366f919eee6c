import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import ConfigError
from router_service.placement import balanced


@given(st.integers(1, 12), st.data())
def test_every_expert_once_and_counts_equal(num_groups, data):
    num_experts = data.draw(st.integers(num_groups, 64))
    holders = balanced({3: num_experts}, num_groups)[3]
    counts = [sum(groups == (group,) for groups in holders) for group in range(num_groups)]
    assert sum(counts) == num_experts
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 1


@given(st.integers(2, 8), st.data())
def test_redundant_slots_are_new_groups_and_balanced(num_groups, data):
    num_experts = data.draw(st.integers(num_groups, 40))
    redundant = data.draw(st.integers(0, num_experts * (num_groups - 1)))
    holders = balanced({0: num_experts}, num_groups, num_redundant_experts=redundant)[0]
    assert sum(len(groups) for groups in holders) == num_experts + redundant
    assert all(list(groups) == sorted(set(groups)) for groups in holders)


def test_redundant_slots_prefer_another_node_and_keep_counts_equal():
    nodes = ["a", "a", "b", "b"]
    holders = balanced({0: 16}, 4, nodes_of_groups=nodes, num_redundant_experts=8)[0]
    counts = [sum(group in groups for groups in holders) for group in range(4)]
    assert counts == [6, 6, 6, 6]
    copies = [groups for groups in holders if len(groups) == 2]
    assert len(copies) == 8
    assert sum(len({nodes[group] for group in groups}) == 2 for groups in copies) >= 6


def test_native_gate_groups_fall_on_one_node_whatever_the_order_of_groups():
    nodes = ["b", "a", "b", "a", "c", "d", "c", "d"]
    holders = balanced({1: 256}, 8, nodes_of_groups=nodes)[1]
    for gate_group in range(8):
        experts = range(gate_group * 32, (gate_group + 1) * 32)
        assert len({nodes[holders[expert][0]] for expert in experts}) == 1
    # Two gate groups a node, in node order.
    assert [nodes[holders[expert][0]] for expert in (0, 63, 64, 127, 128, 192)] == [
        "a",
        "a",
        "b",
        "b",
        "c",
        "d",
    ]


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match=r"experts\.groups is 5, but layer 2 has 4 experts"):
        balanced({1: 8, 2: 4}, 5)
    with pytest.raises(ConfigError, match="num_redundant_experts is 9"):
        balanced({0: 8}, 2, num_redundant_experts=9)
    with pytest.raises(ConfigError, match="1 nodes were named for 2"):
        balanced({0: 8}, 2, nodes_of_groups=["a"])
