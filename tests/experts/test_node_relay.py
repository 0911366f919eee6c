"""A node's call, as the group that receives it runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from experts.errors import MeshError
from experts.group import ExpertGroup
from experts.node_call import NodeCall, NodeShare
from experts.node_relay import NodeRelay
from experts.server import ExpertServer

HIDDEN_TH = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def relay(loaded_group: ExpertGroup) -> Iterator[NodeRelay]:
    relay = NodeRelay(loaded_group)
    yield relay
    relay.close()


def share(group: int, address: str) -> NodeShare:
    return NodeShare(
        group=group,
        address=address,
        tokens_T=None,
        expert_ids_S=torch.tensor([1], dtype=torch.int32),
        offsets_S1=torch.tensor([0, 5], dtype=torch.int32),
        token_rows_R=torch.arange(5, dtype=torch.int32),
        weights_R=torch.ones(5),
    )


def node_call(*addresses: str) -> NodeCall:
    shares = tuple(share(group, address) for group, address in enumerate(addresses))
    return NodeCall(layer=0, hidden_TH=HIDDEN_TH, shares=shares)


def test_each_share_counts_though_two_name_one_address(
    loaded_group: ExpertGroup, relay: NodeRelay, server: ExpertServer
) -> None:
    alone_TH = loaded_group.forward(share(0, "").call(0, HIDDEN_TH))
    got_TH = relay.forward(node_call(server.address, "", server.address))
    assert torch.equal(got_TH, alone_TH + alone_TH + alone_TH)


def test_nobody_elsewhere_is_called(relay: NodeRelay) -> None:
    with pytest.raises(MeshError, match=r"group 1 at 192\.0\.2\.7:80 is not on this node"):
        relay.forward(node_call("", "192.0.2.7:80"))


def test_a_sibling_that_is_gone_is_named(relay: NodeRelay) -> None:
    with pytest.raises(MeshError, match=r"group 0 at 127\.0\.0\.1:1 on this node"):
        relay.forward(node_call("127.0.0.1:1", ""))
