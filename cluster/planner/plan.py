"""Plans a deployment: tries every split of the GPUs, keeps the best that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.planner.hardware import Gpu, Interconnect
from cluster.planner.memory import MemoryPlan, plan_memory
from cluster.planner.models import Model
from cluster.planner.parameters import ParameterCounts, count_parameters
from cluster.planner.precision import Scheme, expert_scheme
from cluster.planner.roofline import Roofline, StepTime, Workload
from cluster.planner.split import Split, splits
from cluster.planner.traffic import Traffic, plan_traffic
from experts.errors import ConfigError

PREFILL_TOKENS = 2048
_MOST_GPUS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What to plan for.

    context:      tokens of a sequence, prompt and answer together
    load:         output tokens/s to sustain, None for as many as there can be
    max_num_seqs: most sequences that one engine decodes at once
    """

    model: Model
    gpu: Gpu
    interconnect: Interconnect
    nodes: int
    gpus_per_node: int
    quantization: str = "none"
    context: int = 4096
    load: float | None = None
    max_num_seqs: int = 256
    wire_dtype: str = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A split of the GPUs and what follows from it. Times are those of a roofline, not of a measurement.

    sequences:          decoded at once by one engine, enough for the load or as many as fit
    binding_constraint: what stops it from fitting, or what most of a step's time is owed to
    """

    request: PlanRequest
    counts: ParameterCounts
    scheme: Scheme
    split: Split
    memory: MemoryPlan
    traffic: Traffic
    sequences: int
    max_sequences: int
    decode: StepTime
    prefill: StepTime
    fits: bool
    binding_constraint: str

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of the whole deployment."""
        return self.split.engine_gpus * self.sequences / self.decode.total if self.sequences else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.split.engine_gpus * PREFILL_TOKENS / self.prefill.total

    @property
    def gpus(self) -> int:
        return self.request.nodes * self.request.gpus_per_node

    @property
    def expert_bytes(self) -> int:
        """All routed experts once."""
        a = self.request.model.architecture
        return a.num_moe_layers * a.num_experts * self.memory.bytes_per_expert

    @property
    def bytes_per_gpu(self) -> int:
        """On the fullest GPU, with the cache that the planned sequences fill."""
        cache = self.sequences * self.request.context * self.memory.kv_bytes_per_token
        return max(self.memory.expert_weights, self.memory.engine_weights + cache)


def make_plan(request: PlanRequest) -> Plan:
    """The best split that fits; where none does, the one that is nearest, with `fits` false.

    Whole nodes first, shared nodes only where experts do not fit on whole ones. Best is most tokens/s, then
    fewest engines. Raises ConfigError for a request that no hardware could meet.
    """
    _check(request)
    counts = count_parameters(request.model.architecture)
    scheme = expert_scheme(request.model.architecture, request.quantization, request.gpu)
    size = (request.nodes, request.gpus_per_node, request.model.architecture.num_experts)
    plans: list[Plan] = []
    for whole_nodes in (True, False):
        plans += [_evaluate(request, counts, scheme, s) for s in splits(*size, whole_nodes=whole_nodes)]
        if any(plan.binding_constraint != "expert_memory" for plan in plans):
            break
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=_shortfall)
    return max(fitting, key=lambda plan: (round(plan.tokens_per_second, 3), -plan.split.engine_gpus))


def _check(request: PlanRequest) -> None:
    architecture = request.model.architecture
    for flag, value in (("--nodes", request.nodes), ("--gpus-per-node", request.gpus_per_node)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: at least 1 is needed")
    if request.nodes * request.gpus_per_node > _MOST_GPUS:
        raise ConfigError(f"--nodes {request.nodes}: at most {_MOST_GPUS} GPUs are planned for")
    if request.nodes * request.gpus_per_node < 2:
        raise ConfigError("1 GPU: an engine and an expert group need one each; give --nodes or --gpus-per-node 2")
    if request.context < 1:
        raise ConfigError(f"--context {request.context}: at least 1 token is needed")
    limit = architecture.max_position_embeddings
    if limit is not None and request.context > limit:
        raise ConfigError(f"--context {request.context}: {request.model.name} has positions for {limit} tokens at most")
    if request.load is not None and not request.load > 0:
        raise ConfigError(f"--load {request.load}: a positive number of tokens/s is needed")
    if request.max_num_seqs < 1:
        raise ConfigError(f"--max-num-seqs {request.max_num_seqs}: at least 1 is needed")
    if architecture.num_moe_layers == 0:
        raise ConfigError(f"{request.model.name}: no layer has experts; check the keys that say which layers are MoE")


def _evaluate(request: PlanRequest, counts: ParameterCounts, scheme: Scheme, split: Split) -> Plan:
    architecture = request.model.architecture
    memory = plan_memory(architecture, counts, scheme, request.gpu, split)
    roofline = Roofline(
        architecture=architecture,
        counts=counts,
        scheme=scheme,
        gpu=request.gpu,
        interconnect=request.interconnect,
        split=split,
        memory=memory,
        traffic=plan_traffic(architecture, split, request.wire_dtype),
    )
    by_memory = memory.sequences(request.context)
    most = min(request.max_num_seqs, by_memory)
    sequences = _sequences_for(request, roofline, most)
    decode = roofline.step(Workload(tokens=max(1, sequences), sequences=sequences, context=request.context))
    plan = Plan(
        request=request,
        counts=counts,
        scheme=scheme,
        split=split,
        memory=memory,
        traffic=roofline.traffic,
        sequences=sequences,
        max_sequences=most,
        decode=decode,
        prefill=roofline.step(Workload(tokens=PREFILL_TOKENS, sequences=1, context=request.context)),
        fits=True,
        binding_constraint="",
    )
    obstacle = _obstacle(plan)
    return replace(plan, fits=obstacle is None, binding_constraint=obstacle or _binding(plan, roofline, by_memory))


def _sequences_for(request: PlanRequest, roofline: Roofline, most: int) -> int:
    """The fewest sequences at once on an engine that give the load; `most` without one or if too much."""
    if request.load is None or most == 0:
        return most

    def rate(sequences: int) -> float:
        step = roofline.step(Workload(tokens=sequences, sequences=sequences, context=request.context))
        return roofline.split.engine_gpus * sequences / step.total

    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if rate(middle) >= request.load:
            high = middle
        else:
            low = middle + 1
    return low


def _obstacle(plan: Plan) -> str | None:
    if not plan.memory.experts_fit:
        return "expert_memory"
    if plan.memory.kv_cache <= 0:
        return "engine_memory"
    if plan.max_sequences == 0:
        return "kv_cache"
    load = plan.request.load
    return "load" if load is not None and plan.tokens_per_second < load else None


def _binding(plan: Plan, roofline: Roofline, by_memory: int) -> str:
    """What most of a decode step is owed to, or the cache where twice the sequences would give much more."""
    context = plan.request.context
    if plan.sequences == by_memory:
        twice = 2 * plan.sequences
        step = roofline.step(Workload(tokens=twice, sequences=twice, context=context))
        if plan.split.engine_gpus * twice / step.total > 1.25 * plan.tokens_per_second:
            return "kv_cache"
    parts = plan.decode.parts()
    return max(parts, key=lambda name: parts[name])


def _shortfall(plan: Plan) -> tuple[float, ...]:
    """How far a split is from fitting, nearest first: memory over what there is, then tokens/s."""
    memory = plan.memory
    experts = max(0.0, memory.expert_weights / memory.usable - 1)
    needed = memory.engine_weights + memory.kv_bytes_per_token * plan.request.context
    engine = max(0.0, needed / memory.usable - 1)
    return (max(experts, engine), -plan.tokens_per_second)
