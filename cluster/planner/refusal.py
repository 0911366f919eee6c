"""The one line that refuses a plan that cannot work."""

from __future__ import annotations

from cluster.planner.advice import Change, smallest_that_fits
from cluster.planner.plan import Plan

_GIB = 2**30


def refusal(plan: Plan) -> str:
    """What does not fit, by how much, and the smallest things that would."""
    request = plan.request
    where = f"{request.model.name} on {request.nodes} x {request.gpus_per_node} {request.gpu.name}"
    changes = _one_of_each_kind(plan)
    if changes:
        mend = "what would: " + "; ".join(f"{change.flag} ({change.meaning})" for change in changes)
    else:
        mend = "no nodes, card and quantisation that the planner knows would: lower --context or --load"
    return f"{where} does not fit: {_why(plan)}; {mend}"


def _one_of_each_kind(plan: Plan) -> list[Change]:
    """The smallest change of nodes, of card and of quantisation."""
    kinds: dict[tuple[bool, bool], Change] = {}
    for change in smallest_that_fits(plan):
        request = change.plan.request
        kinds.setdefault((request.gpu == plan.request.gpu, request.quantization == plan.request.quantization), change)
    return list(kinds.values())


def _why(plan: Plan) -> str:
    memory, split, request = plan.memory, plan.split, plan.request
    usable = f"{memory.usable / _GIB:.1f} GiB usable"
    match plan.binding_constraint:
        case "expert_memory":
            most = request.model.architecture.num_experts
            why = (
                f"each of {split.groups} expert groups needs {memory.expert_weights / _GIB:.1f} GiB "
                f"({plan.scheme.name}) of {usable} on its GPU"
            )
            return why + (f", and a layer's {most} experts make no more groups" if split.groups == most else "")
        case "engine_memory":
            return (
                f"an engine, which is one GPU (there is no tensor parallelism), needs "
                f"{memory.engine_weights / _GIB:.1f} GiB for attention and all but the routed experts, "
                f"of {usable}"
            )
        case "kv_cache":
            one = memory.kv_bytes_per_token * request.context / _GIB
            return (
                f"an engine has {memory.kv_cache / _GIB:.1f} GiB left for its KV cache beside its weights, "
                f"and one sequence of {request.context} tokens takes {one:.1f} GiB"
            )
        case _:
            return (
                f"{request.load:,.0f} tokens/s are asked for and {plan.tokens_per_second:,.0f} estimated, "
                f"with {plan.sequences} sequences of {request.context} tokens on each of "
                f"{split.engine_gpus} engines"
            )
