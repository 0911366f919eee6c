"""The numbers of a plan that Kubernetes manifests and mesh.yaml hold."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.assumptions import ASSUMPTIONS
from cluster.planner.plan import Plan

CPUS_PER_GPU = 4
SHM_GIB_PER_GPU = 4
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerGroupNumbers:
    """One worker group of a RayCluster: `replicas` pods, each of `gpus_per_pod` of `gpu_resource`.

    Memory and shared memory are in GiB of a pod; shared memory is part of its memory.
    """

    group_name: str
    replicas: int
    gpu_resource: str
    gpus_per_pod: int
    cpus_per_pod: int
    memory_gib_per_pod: int
    shm_gib_per_pod: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentNumbers:
    """What an overlay holds.

    engine, experts:       the worker groups
    engine_replicas:       `engine.replicas` of mesh.yaml, one a GPU
    expert_groups:         `experts.groups`, one a GPU; `group_replicas` copies of each
    num_redundant_experts: `experts.num_redundant_experts`, slots a layer beyond one an expert
    max_num_seqs, max_model_len, kv_cache_memory (bytes of one engine): keys of `engine`
    quantization:          `model.quantization`
    """

    engine: WorkerGroupNumbers
    experts: WorkerGroupNumbers
    engine_replicas: int
    expert_groups: int
    group_replicas: int
    num_redundant_experts: int
    max_num_seqs: int
    max_model_len: int
    kv_cache_memory: int
    quantization: str


def deployment_numbers(plan: Plan) -> DeploymentNumbers:
    """The numbers of a plan that fits.

    A pod's host memory holds its GPUs' weights in the page cache, so that a group that restarts reads no
    disk, and a fixed part a GPU for the process. Shared memory, Ray's object store, is of that fixed part.
    """
    assert plan.fits, "a plan that does not fit deploys nowhere"
    split, memory = plan.split, plan.memory
    return DeploymentNumbers(
        engine=_worker_group("engine", plan, split.engine_gpus, memory.engine_weights),
        experts=_worker_group("experts", plan, split.expert_gpus, memory.expert_weights),
        engine_replicas=split.engine_gpus,
        expert_groups=split.groups,
        group_replicas=split.group_replicas,
        num_redundant_experts=split.num_redundant_experts,
        max_num_seqs=plan.max_sequences,
        max_model_len=plan.request.context,
        kv_cache_memory=memory.kv_cache // _GIB * _GIB,
        quantization=plan.request.quantization,
    )


def _worker_group(name: str, plan: Plan, gpus: int, weights: int) -> WorkerGroupNumbers:
    pod_gpus = plan.split.pod_gpus
    memory = -(-pod_gpus * (weights + ASSUMPTIONS.host_bytes_per_gpu) // _GIB)
    return WorkerGroupNumbers(
        group_name=name,
        replicas=gpus // pod_gpus,
        gpu_resource=plan.request.gpu.kubernetes_resource,
        gpus_per_pod=pod_gpus,
        cpus_per_pod=pod_gpus * CPUS_PER_GPU,
        memory_gib_per_pod=memory,
        shm_gib_per_pod=pod_gpus * SHM_GIB_PER_GPU,
    )
