"""The one configuration document, `mesh.yaml`. Field descriptions are its reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    source: str = Field(description="Checkpoint directory, or hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "fp16", "fp8", "fp8_block", "int8", "int4"] = "none"
    served_name: str | None = None
    revision: str | None = None


class ExpertsConfig(_Section):
    groups: Annotated[int, Field(ge=1, le=4096)] = 4
    num_gpus: float | Auto = "auto"
    num_cpus: float = Field(0.1, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_redundant_experts: Annotated[int, Field(ge=0)] = 0
    placement: Literal["balanced"] = "balanced"
    on_expert_loss: Literal["failover", "reload", "degrade", "fail"] = "failover"
    listen_host: str = Field("auto", description="Address that groups listen on; auto: their Ray node's")
    label_selector: dict[str, str] = Field(default_factory=dict, description="Ray node labels that groups need")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources of each group")


class RouterConfig(_Section):
    transport: Literal["in_process", "grpc", "ray"] = "grpc"
    wire_dtype: Literal["auto", "model", "bf16", "fp8"] = "auto"
    max_nodes_per_token: Annotated[int, Field(ge=1)] | None = None
    node_limit_mode: Literal["exact", "restrict"] = "exact"
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    recovery_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    service_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Offer RouterService over gRPC on this port of each engine; 0: any free one; null: not"
    )


class EngineConfig(_Section):
    replicas: Annotated[int, Field(ge=1)] = 1
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    max_model_len: Annotated[int, Field(ge=1)] | Auto = "auto"
    kv_cache_memory: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="Bytes, or auto")
    max_queue_len: Annotated[int, Field(ge=0)] = 256
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float | Auto = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    label_selector: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, float] = Field(default_factory=dict)


class EplbConfig(_Section):
    window_size: Annotated[int, Field(ge=1)] = 1000
    step_interval: Annotated[int, Field(ge=1)] = 3000
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.05


class WorkerGroupConfig(_Section):
    """A Kubernetes worker group as scaling counts it: Serve replicas that one pod takes, and bounds in pods."""

    replicas_per_pod: Annotated[int, Field(ge=1)]
    min_pods: Annotated[int, Field(ge=0)] = 1
    max_pods: Annotated[int, Field(ge=1)]


class WorkerGroupsConfig(_Section):
    ray_service: str = "expertmesh"
    namespace: str | None = Field(None, description="The pod's own where not given")
    shrink_after_s: Annotated[float, Field(ge=0)] = 600.0
    engine: WorkerGroupConfig
    experts: WorkerGroupConfig


class AutoscalingSection(_Section):
    engine: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    worker_groups: WorkerGroupsConfig | None = Field(
        None,
        description="Makes the controller the owner of `replicas` of a RayCluster's worker groups: pods are asked for "
        "when a policy wants replicas. Absent: Ray's autoscaler owns them, or whoever wrote the manifest",
    )


class HttpConfig(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys_file: str | None = None


class MeshConfig(_Section):
    """The whole document."""

    model: ModelConfig
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    engine: EngineConfig = EngineConfig()
    eplb_config: EplbConfig = EplbConfig()
    autoscaling: AutoscalingSection = AutoscalingSection()
    http: HttpConfig = HttpConfig()
