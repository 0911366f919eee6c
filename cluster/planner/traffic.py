"""What crosses between engines and expert groups for one token and MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.architecture import Architecture
from cluster.planner.nodes_touched import expected_nodes, touch_probabilities
from cluster.planner.split import Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Per token and MoE layer. A node gets one copy of the token's row and sends one partial sum back.

    nodes:          expected nodes that a token's experts lie on
    remote_nodes:   of these, the ones that are not the engine's own
    dispatch_bytes: to all of them
    combine_bytes:  back
    """

    nodes: float
    remote_nodes: float
    dispatch_bytes: float
    combine_bytes: float

    @property
    def remote_bytes(self) -> float:
        """Each way across the interconnect, the larger of the two ways."""
        return max(self.dispatch_bytes, self.combine_bytes) * self.remote_nodes / self.nodes


def wire_row_bytes(architecture: Architecture, wire_dtype: str) -> int:
    """Bytes of one token's row. fp8 has one float32 scale for each 128 numbers (DeepSeek-V3 report, section
    3.3).
    """
    if wire_dtype == "fp8":
        return architecture.hidden_size + 4 * -(-architecture.hidden_size // 128)
    return architecture.hidden_size * (2 if wire_dtype == "bf16" else architecture.dtype_bytes)


def plan_traffic(architecture: Architecture, split: Split, wire_dtype: str) -> Traffic:
    """Expected traffic under `split`. Partial sums come back in bf16 where rows went out in fp8."""
    a = architecture
    draw = (split.holders(), a.experts_per_token, a.num_groups, a.topk_group)
    nodes = expected_nodes(*draw)
    shared = split.shared_node()
    local = 0.0
    if shared is not None and shared < len(split.groups_on_node()):
        on_shared = min(split.engine_gpus, split.gpus_per_node - split.expert_gpus % split.gpus_per_node)
        local = touch_probabilities(*draw)[shared] * on_shared / split.engine_gpus
    back = "bf16" if wire_dtype == "fp8" else wire_dtype
    return Traffic(
        nodes=nodes,
        remote_nodes=nodes - min(local, nodes),
        dispatch_bytes=nodes * wire_row_bytes(a, wire_dtype),
        combine_bytes=nodes * wire_row_bytes(a, back),
    )
