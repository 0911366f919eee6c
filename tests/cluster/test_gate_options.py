"""What mesh.yaml asks of gates is refused where the router has none to ask it of."""

from __future__ import annotations

import pytest

from cluster.config.mesh import RouterConfig
from cluster.gate_options import check_gate_options
from experts.errors import ConfigError

THEIRS = {"model_type": "olmoe"}
OURS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
CAPACITY = RouterConfig(capacity_factor=1.5)
RESTRICT = RouterConfig(max_nodes_per_token=2, node_limit_mode="restrict")


@pytest.mark.parametrize(("router", "key"), [(CAPACITY, "capacity_factor"), (RESTRICT, "node_limit_mode")])
def test_a_gate_of_transformers_own_is_neither_capped_nor_restricted(router: RouterConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{key}: the gate of olmoe models is .* leave it out"):
        check_gate_options(router, THEIRS)


def test_what_can_be_done_is_taken() -> None:
    for router in (CAPACITY, RESTRICT):
        check_gate_options(router, OURS)
    for router in (RouterConfig(), RouterConfig(max_nodes_per_token=2)):
        check_gate_options(router, THEIRS)
