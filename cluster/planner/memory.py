"""Bytes on one GPU: of an expert group, and of an engine with its KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.architecture import Architecture
from cluster.planner.assumptions import ASSUMPTIONS
from cluster.planner.hardware import Gpu
from cluster.planner.parameters import ParameterCounts
from cluster.planner.precision import Scheme, expert_bytes
from cluster.planner.split import Split


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes. An engine holds its weights whole: there is no tensor parallelism, one engine is one GPU.

    usable:             of one GPU
    expert_weights:     on the GPU of an expert group, all its slots of all layers
    engine_weights:     everything that is not a routed expert, at the model's own dtype (fp8 is widened)
    kv_bytes_per_token: over all layers
    kv_cache:           what is left for it on an engine's GPU; negative where the weights alone do not fit
    """

    usable: int
    bytes_per_expert: int
    expert_weights: int
    engine_weights: int
    kv_bytes_per_token: int
    kv_cache: int

    def sequences(self, context: int) -> int:
        """Whole sequences of `context` tokens whose keys and values one engine can hold."""
        return max(0, self.kv_cache // (self.kv_bytes_per_token * context))

    @property
    def experts_fit(self) -> bool:
        return self.expert_weights <= self.usable


def plan_memory(
    architecture: Architecture, counts: ParameterCounts, scheme: Scheme, gpu: Gpu, split: Split
) -> MemoryPlan:
    """Memory of one GPU of each kind under `split`."""
    usable = int(gpu.memory_bytes * ASSUMPTIONS.gpu_memory_utilization)
    engine_weights = counts.engine * architecture.dtype_bytes
    per_expert = expert_bytes(architecture, scheme)
    return MemoryPlan(
        usable=usable,
        bytes_per_expert=per_expert,
        expert_weights=architecture.num_moe_layers * split.slots_per_group * per_expert,
        engine_weights=engine_weights,
        kv_bytes_per_token=architecture.cache_layers * architecture.attention.cache_width * architecture.dtype_bytes,
        kv_cache=usable - engine_weights,
    )
