"""The one configuration document, `mesh.yaml`. Field descriptions are its reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes `yes` for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("not_a_truth_value", "Input should not be a truth value (yes, no, on, off)")
        return value


class ModelConfig(_Section):
    source: str = Field(min_length=1, description="Checkpoint directory, or hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's own on a GPU, float32 on a CPU"
    )
    quantization: Literal["none", "fp16", "fp8", "fp8_block", "int8", "int4"] = Field(
        "none", description="How groups hold experts; CPUs have none, fp16 and int8, GPUs all but fp16"
    )
    served_name: str | None = Field(None, description="What clients call the model; null: directory's name or hub id")
    revision: str | None = Field(None, description="Of a hub id: branch, tag or commit")


class ExpertsConfig(_Section):
    groups: Annotated[int, Field(ge=1, le=4096)] = Field(4, description="Expert groups, each an actor on its device")
    num_gpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    num_cpus: float = Field(0.1, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_redundant_experts: Annotated[int, Field(ge=0)] = Field(
        0, description="Slots of each layer beyond one per expert"
    )
    on_expert_loss: Literal["failover", "reload", "degrade", "fail"] = Field(
        "failover",
        description="failover: another replica, else wait; reload: wait for the group itself; degrade: go on "
        "without what nobody holds, counted; fail: an error at once",
    )
    listen_host: str = Field("auto", description="Address that groups listen on; auto: their Ray node's")
    label_selector: dict[str, str] = Field(default_factory=dict, description="Ray node labels that groups need")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources of each group")


class RouterConfig(_Section):
    transport: Literal["in_process", "grpc", "ray"] = Field(
        "grpc", description="ray: object refs; in_process: the experts live in the engine's process"
    )
    wire_dtype: Literal["model", "bf16", "fp8"] = Field(
        "model", description="What tensors travel in; model: nothing is lost with a float32 model"
    )
    max_nodes_per_token: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Limit the nodes that a token's experts are on; null: no limit"
    )
    node_limit_mode: Literal["exact", "restrict"] = Field(
        "exact", description="exact: choose among replicas, outputs unchanged; restrict: DeepSeek-V2's, outputs change"
    )
    capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Tokens of an expert beyond ceil(T*K/E * factor) overflow; null: no capacity"
    )
    overflow: Literal["drop", "next_best"] = Field("drop", description="Where overflowing tokens go")
    recovery_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="Longest wait for a lost group, and for a hanging one first, before requests in flight fail"
    )
    service_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Offer RouterService over gRPC on this port of each engine; 0: any free one; null: not"
    )


class EngineConfig(_Section):
    replicas: Annotated[int, Field(ge=1)] = 1
    max_num_seqs: Annotated[int, Field(ge=1)] = Field(64, description="Sequences computed at a time")
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = Field(2048, description="Tokens of one step")
    max_model_len: Annotated[int, Field(ge=1)] | Auto = "auto"
    kv_cache_memory: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="Bytes, or auto")
    max_queue_len: Annotated[int, Field(ge=0)] = Field(256, description="Sequences that may wait; then 429")
    enable_dbo: bool = Field(
        False,
        description="Dual batch overlap: compute large steps as two micro-batches, one while the other's experts are "
        "out. Outputs are unchanged. Pays where experts are elsewhere, costs where they share the engine's "
        "processors; `expertmesh bench overlap` measures both",
    )
    dbo_decode_token_threshold: Annotated[int, Field(ge=2)] = Field(
        128, description="Fewest tokens of a step that is overlapped, where all sequences decode"
    )
    dbo_prefill_token_threshold: Annotated[int, Field(ge=2)] = Field(
        512, description="The same where prompts are in the step"
    )
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    label_selector: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, float] = Field(default_factory=dict)


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
    host: str = Field("127.0.0.1", min_length=1)
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys_file: str | None = Field(None, description="One key a line; /v1 then wants one as bearer token")


class MeshConfig(_Section):
    """The whole document."""

    model: ModelConfig
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    engine: EngineConfig = EngineConfig()
    autoscaling: AutoscalingSection = AutoscalingSection()
    http: HttpConfig = HttpConfig()
