"""What mesh.yaml asks of the gates: a capacity of experts, a limit of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.config.mesh import RouterConfig
from experts.errors import ConfigError
from router_service.gating.capacity import CapacityGate
from router_service.gating.config import gate_spec_from_config
from router_service.gating.gate import Gate


def check_gate_options(router: RouterConfig, model_config: Mapping[str, Any]) -> None:
    """See that the router has the gate that it is to cap or to limit.

    model_config: config.json. Raises ConfigError for a family whose gate is transformers' own, and CheckpointError for
    a config.json that contradicts itself.
    """
    asked = {
        "capacity_factor": router.capacity_factor is not None,
        "node_limit_mode": router.node_limit_mode == "restrict",
    }
    keys = [f"router.{key}" for key, given in asked.items() if given]
    if keys and gate_spec_from_config(model_config) is None:
        raise ConfigError(
            f"{' and '.join(keys)}: the gate of {model_config.get('model_type')} models is transformers' own, which "
            "chooses experts before the router can have a say; leave it out"
        )


def with_capacity(
    gates: Mapping[int, Gate], experts_per_layer: Mapping[int, int], router: RouterConfig
) -> Mapping[int, Gate]:
    """`gates` by layer, each within `router.capacity_factor` where there is one."""
    if router.capacity_factor is None:
        return gates
    return {
        layer: CapacityGate(gate, experts_per_layer[layer], router.capacity_factor, router.overflow)
        for layer, gate in gates.items()
    }
