"""What the planner takes for granted. Printed with every plan, so that a reader can disagree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Fractions of data sheet figures that are reached, and costs that no data sheet has.

    gpu_memory_utilization:   of a card's memory; the rest is the CUDA context, activations, fragmentation
    memory_efficiency:        of memory bandwidth, decode kernels
    compute_efficiency:       of bf16 peak, grouped and dense matmuls
    fp8_compute_efficiency:   of fp8 peak, block-scaled grouped matmul
    expert_imbalance:         rows of the busiest group over the mean
    layer_overhead_s:         an engine's layer outside its arithmetic: launches of eager PyTorch
    transport_latency_s:      one small call to a group and back over a gRPC stream
    stream_bytes_per_s:       one gRPC stream each way, copies to and from the card included
    host_bytes_per_gpu:       host memory of a worker beside the page cache that holds its weights
    """

    gpu_memory_utilization: float = 0.9
    memory_efficiency: float = 0.75
    compute_efficiency: float = 0.5
    fp8_compute_efficiency: float = 0.25
    expert_imbalance: float = 1.2
    layer_overhead_s: float = 0.25e-3
    transport_latency_s: float = 0.35e-3
    stream_bytes_per_s: float = 1.4e9
    host_bytes_per_gpu: int = 16 * 2**30


ASSUMPTIONS = Assumptions()
