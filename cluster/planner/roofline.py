"""How long a step takes: compute, memory bandwidth and dispatch, whichever bounds each part.

All engines step together and a group answers them in one forward, as its batcher coalesces calls of one
layer. The shared expert runs while the experts are out; nothing else is taken to overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.architecture import Architecture
from cluster.planner.assumptions import ASSUMPTIONS
from cluster.planner.hardware import Gpu, Interconnect
from cluster.planner.memory import MemoryPlan
from cluster.planner.parameters import ParameterCounts
from cluster.planner.precision import Scheme
from cluster.planner.split import Split
from cluster.planner.traffic import Traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Of one engine's step: its tokens, its sequences, and the cached tokens that each sequence reads."""

    tokens: int
    sequences: int
    context: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step by what bounds them; `exposed_shared` is shared experts beyond the dispatch."""

    engine_bandwidth: float
    engine_compute: float
    engine_overhead: float
    exposed_shared: float
    expert_bandwidth: float
    expert_compute: float
    dispatch_latency: float
    dispatch_bandwidth: float
    experts_hit_per_group: float

    def parts(self) -> dict[str, float]:
        """Seconds by the constraint that they are owed to. They add up to the step."""
        return {
            "engine_bandwidth": self.engine_bandwidth,
            "engine_compute": self.engine_compute + self.exposed_shared,
            "engine_overhead": self.engine_overhead,
            "expert_bandwidth": self.expert_bandwidth,
            "expert_compute": self.expert_compute,
            "dispatch_latency": self.dispatch_latency,
            "dispatch_bandwidth": self.dispatch_bandwidth,
        }

    @property
    def total(self) -> float:
        return sum(self.parts().values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """Everything that a step's time follows from."""

    architecture: Architecture
    counts: ParameterCounts
    scheme: Scheme
    gpu: Gpu
    interconnect: Interconnect
    split: Split
    memory: MemoryPlan
    traffic: Traffic

    def step(self, load: Workload) -> StepTime:
        """Time of one step of every engine."""
        layers = self.architecture.num_moe_layers
        engine_bytes, engine_flops = self._engine(load)
        engine_bandwidth, engine_compute = self._bound(engine_bytes, engine_flops, self._bf16_flops)
        shared = sum(self._bound(*self._shared(load), self._bf16_flops)) / layers
        expert_bytes, expert_flops, hit = self._expert_layer(load)
        expert_bandwidth, expert_compute = self._bound(expert_bytes, expert_flops, self._expert_flops)
        latency, transfer = self._dispatch_layer(load)
        away = expert_bandwidth + expert_compute + latency + transfer
        return StepTime(
            engine_bandwidth=engine_bandwidth,
            engine_compute=engine_compute,
            engine_overhead=self.architecture.num_layers * ASSUMPTIONS.layer_overhead_s,
            exposed_shared=layers * max(0.0, shared - away),
            expert_bandwidth=layers * expert_bandwidth,
            expert_compute=layers * expert_compute,
            dispatch_latency=layers * latency,
            dispatch_bandwidth=layers * transfer,
            experts_hit_per_group=hit,
        )

    @property
    def _bf16_flops(self) -> float:
        return self.gpu.bf16_flops * ASSUMPTIONS.compute_efficiency

    @property
    def _expert_flops(self) -> float:
        if self.scheme.name == "fp8" and self.gpu.fp8_flops is not None:
            return self.gpu.fp8_flops * ASSUMPTIONS.fp8_compute_efficiency
        return self._bf16_flops

    def _bound(self, num_bytes: float, flops: float, flops_per_s: float) -> tuple[float, float]:
        """(seconds, 0) where memory bandwidth bounds, (0, seconds) where arithmetic does."""
        reading = num_bytes / (self.gpu.memory_bytes_per_s * ASSUMPTIONS.memory_efficiency)
        computing = flops / flops_per_s
        return (reading, 0.0) if reading >= computing else (0.0, computing)

    def _engine(self, load: Workload) -> tuple[float, float]:
        """Bytes and FLOPs of one engine's step, shared experts aside: weights and caches are read once."""
        a, counts = self.architecture, self.counts
        weights = counts.engine - counts.shared_experts - (0 if a.tied_embeddings else counts.input_embedding)
        cache = load.sequences * load.context * self.memory.kv_bytes_per_token
        attention = 2 * a.attention.score_width * load.context * load.tokens * a.cache_layers
        return weights * a.dtype_bytes + cache, 2 * weights * load.tokens + attention

    def _shared(self, load: Workload) -> tuple[float, float]:
        shared = self.counts.shared_experts
        return shared * self.architecture.dtype_bytes, 2 * shared * load.tokens

    def _expert_layer(self, load: Workload) -> tuple[float, float, float]:
        """Bytes and FLOPs of the busiest group for one layer, and how many of its experts are hit.

        Tokens choose independently: an expert is missed by all T of them with probability (1 - K/E)^T.
        """
        a, split = self.architecture, self.split
        tokens = load.tokens * split.engine_gpus / split.group_replicas
        missed = (1.0 - a.experts_per_token / a.num_experts) ** tokens
        hit = split.slots_per_group * (1.0 - missed)
        rows = tokens * a.experts_per_token / split.groups * ASSUMPTIONS.expert_imbalance
        return hit * self.memory.bytes_per_expert, 2 * rows * a.expert_parameters, hit

    def _dispatch_layer(self, load: Workload) -> tuple[float, float]:
        """Latency, and the slower of an engine's streams (one a node) and the busiest link, both ways."""
        split, traffic = self.split, self.traffic
        streams = len(split.groups_on_node())
        both = load.tokens * (traffic.dispatch_bytes + traffic.combine_bytes)
        streaming = both / (streams * ASSUMPTIONS.stream_bytes_per_s)
        sending_nodes = max(1, -(-split.engine_gpus // split.gpus_per_node))
        busiest_nodes = min(sending_nodes, streams * split.group_replicas)
        remote = load.tokens * split.engine_gpus * traffic.remote_nodes / traffic.nodes
        crossing = remote * (traffic.dispatch_bytes + traffic.combine_bytes)
        linking = crossing / (busiest_nodes * self.interconnect.bytes_per_s)
        return ASSUMPTIONS.transport_latency_s, max(streaming, linking)
