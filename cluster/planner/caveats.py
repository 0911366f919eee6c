"""What a reader of a plan should know before believing or booking it."""

from __future__ import annotations

from cluster.planner.plan import Plan
from cluster.planner.traffic import wire_row_bytes


def warnings_of(plan: Plan) -> tuple[str, ...]:
    """One sentence each; empty for a plan without surprises."""
    request, split = plan.request, plan.split
    architecture = request.model.architecture
    found: list[str] = []
    if request.model.rumoured:
        found.append(f"{request.model.name} is a rumour: its publisher states none of these numbers")
    if architecture.num_cross_attention:
        found.append("encoder-decoder: the engine serves decoders only; the MoE layers can be served by the router")
    if architecture.checkpoint_scheme == "fp8" and request.gpu.fp8_flops is None and plan.scheme.name == "bf16":
        found.append(f"{request.gpu.name} has no fp8 units: the fp8 experts are widened to bf16, twice the bytes")
    if split.shared_node() is not None and request.nodes > 1:
        found.append("engines and expert groups share a node: pods are smaller than nodes")
    if split.group_replicas > 1:
        found.append(
            f"more GPUs than the {architecture.num_experts} experts of a layer: "
            f"every group runs {split.group_replicas} times"
        )
    aligned = all(groups * architecture.num_groups % split.groups == 0 for groups in split.groups_on_node())
    if architecture.num_groups > 1 and len(split.groups_on_node()) > 1 and not aligned:
        found.append(
            f"{architecture.num_groups} native gate groups do not fall on whole nodes of "
            f"{len(split.groups_on_node())}: tokens touch more nodes than they must"
        )
    if plan.sequences and plan.sequences < 8:
        found.append(f"an engine holds {plan.sequences} sequences of {request.context} tokens at once: very few")
    if request.interconnect.bytes_per_s < 1e10 and len(split.groups_on_node()) > 1:
        row = wire_row_bytes(architecture, request.wire_dtype)
        found.append(f"{request.interconnect.name} carries {row} bytes a token, layer and node: expect it to bind")
    return tuple(found)
