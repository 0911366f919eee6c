"""A plan as plain data: what `--json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.planner.advice import Change, cheapest_lift, smallest_that_fits
from cluster.planner.assumptions import ASSUMPTIONS
from cluster.planner.caveats import warnings_of
from cluster.planner.cost import dollars_per_million_tokens
from cluster.planner.deployment import deployment_numbers
from cluster.planner.plan import Plan


def summarize(plan: Plan, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Every figure of a plan in bytes, seconds, tokens/s. `suggestions` would make it fit, or faster."""
    request, split, memory = plan.request, plan.split, plan.memory
    changes: Sequence[Change]
    if plan.fits:
        lift = cheapest_lift(plan)
        changes = () if lift is None else (lift,)
    else:
        changes = smallest_that_fits(plan)
    return {
        "model": request.model.name,
        "source": request.model.source,
        "rumoured": request.model.rumoured,
        "note": request.model.note,
        "total_params": plan.counts.total,
        "active_params": plan.counts.active,
        "active_params_with_embedding": plan.counts.active_with_embedding,
        "params": {
            part: getattr(plan.counts, part)
            for part in (
                "input_embedding",
                "output_head",
                "attention",
                "norms",
                "dense_mlp",
                "shared_experts",
                "gates",
                "routed_experts",
                "active_routed_experts",
            )
        },
        "quantization": plan.scheme.name,
        "expert_bytes": plan.expert_bytes,
        "bytes_per_expert": memory.bytes_per_expert,
        "engine_bytes": memory.engine_weights,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "bytes_per_gpu": plan.bytes_per_gpu,
        "memory_per_gpu": {
            "usable": memory.usable,
            "expert_gpu_weights": memory.expert_weights,
            "engine_gpu_weights": memory.engine_weights,
            "engine_gpu_kv_cache": max(0, memory.kv_cache),
        },
        "gpu": request.gpu.name,
        "interconnect": request.interconnect.name,
        "gpus": plan.gpus,
        "nodes": request.nodes,
        "gpus_per_node": request.gpus_per_node,
        "placement": {
            "engine_gpus": split.engine_gpus,
            "expert_groups": split.groups,
            "group_replicas": split.group_replicas,
            "groups_on_node": list(split.groups_on_node()),
            "slots_per_layer_and_group": split.slots_per_group,
            "slots_per_group": split.slots_per_group * request.model.architecture.num_moe_layers,
            "num_redundant_experts": split.num_redundant_experts,
        },
        "context": request.context,
        "load": request.load,
        "sequences_per_engine": plan.sequences,
        "sequences": plan.sequences * split.engine_gpus,
        "fits": plan.fits,
        "binding_constraint": plan.binding_constraint,
        "nodes_per_token": plan.traffic.nodes,
        "remote_nodes_per_token": plan.traffic.remote_nodes,
        "dispatch_bytes_per_token_layer": plan.traffic.dispatch_bytes,
        "combine_bytes_per_token_layer": plan.traffic.combine_bytes,
        "dispatch_seconds_per_layer": (plan.decode.dispatch_latency + plan.decode.dispatch_bandwidth)
        / request.model.architecture.num_moe_layers,
        "decode_step": {"seconds": plan.decode.total, **plan.decode.parts()},
        "prefill_step": {"seconds": plan.prefill.total, **plan.prefill.parts()},
        "experts_hit_per_group_and_layer": plan.decode.experts_hit_per_group,
        "tokens_per_second": plan.tokens_per_second,
        "prefill_tokens_per_second": plan.prefill_tokens_per_second,
        "seconds_per_token": plan.decode.total,
        "dollars_per_million_tokens": dollars_per_million_tokens(plan, price_per_gpu_hour),
        "warnings": list(warnings_of(plan)),
        "suggestions": [
            {
                "change": change.meaning,
                "flag": change.flag,
                "gpus": change.plan.gpus,
                "tokens_per_second": change.plan.tokens_per_second,
                "binding_constraint": change.plan.binding_constraint,
            }
            for change in changes
        ],
        "deployment": asdict(deployment_numbers(plan)) if plan.fits else None,
        "assumptions": asdict(ASSUMPTIONS),
    }
