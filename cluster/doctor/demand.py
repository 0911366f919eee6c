"""What mesh.yaml asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.mesh import EngineConfig, ExpertsConfig, MeshConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """GPUs and CPUs of all engines and expert groups together, as Ray counts them."""

    gpus: float
    cpus: float


def demand(config: MeshConfig, *, has_gpu: bool) -> Demand:
    """The demand where a cluster has GPUs, or has none (what `auto` depends on)."""
    engines, groups = config.engine.replicas, config.experts.groups
    if config.router.transport == "in_process":
        groups = 0
    return Demand(
        gpus=engines * _gpus(config.engine, has_gpu) + groups * _gpus(config.experts, has_gpu),
        cpus=engines * config.engine.num_cpus + groups * config.experts.num_cpus,
    )


def _gpus(section: EngineConfig | ExpertsConfig, has_gpu: bool) -> float:
    if section.num_gpus != "auto":
        return section.num_gpus
    return 1.0 if section.device == "cuda" or (section.device == "auto" and has_gpu) else 0.0
