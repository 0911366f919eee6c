from __future__ import annotations

from cluster.planner.split import Split, splits


def test_every_gpu_has_one_role_and_pods_divide_nodes() -> None:
    for whole_nodes in (True, False):
        for split in splits(4, 8, 256, whole_nodes=whole_nodes):
            assert split.engine_gpus + split.expert_gpus == 32
            assert split.whole_nodes == whole_nodes
            assert 8 % split.pod_gpus == 0
            assert split.expert_gpus % split.pod_gpus == 0
            assert split.slots_per_group * split.groups == 256 + split.num_redundant_experts
            assert sum(split.groups_on_node()) == split.groups


def test_there_are_never_more_groups_than_experts() -> None:
    found = [*splits(4, 8, 8, whole_nodes=True)]
    assert [(split.groups, split.group_replicas) for split in found] == [(8, 3), (8, 2), (8, 1)]


def test_a_single_node_is_shared() -> None:
    assert not [*splits(1, 8, 64, whole_nodes=True)]
    shared = [*splits(1, 8, 64, whole_nodes=False)]
    assert [split.engine_gpus for split in shared] == list(range(1, 8))
    assert {split.shared_node() for split in shared} == {0}


def test_the_node_that_both_share() -> None:
    split = Split(nodes=2, gpus_per_node=8, num_experts=256, engine_gpus=6, groups=10, group_replicas=1)
    assert (split.shared_node(), split.groups_on_node(), split.pod_gpus) == (1, (8, 2), 2)
