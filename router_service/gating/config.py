"""From a model's config.json to its gate's spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experts.errors import CheckpointError
from router_service.gating.gate import GateSpec


def gate_spec_from_config(config: Mapping[str, Any]) -> GateSpec | None:
    """The gate of the model that `config` (config.json as a mapping) describes; None for a family that we
    lack.

    Raises CheckpointError naming the key where a known family's config is incomplete or contradicts itself.
    """
    reader = _READERS.get(config.get("model_type", ""))
    if reader is None:
        return None
    spec = reader(config)
    if not 1 <= spec.num_experts_per_tok <= spec.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {spec.num_experts_per_tok}, must be 1 to the number of "
            "experts "
            f"({spec.num_experts})"
        )
    if spec.n_group is not None and spec.topk_group is not None:
        if spec.n_group < 1 or spec.num_experts % spec.n_group:
            raise CheckpointError(
                f"config.json: n_group is {spec.n_group}, must divide the number of experts ({spec.num_experts})"
            )
        eligible = spec.topk_group * (spec.num_experts // spec.n_group)
        if not 1 <= spec.topk_group <= spec.n_group or eligible < spec.num_experts_per_tok:
            raise CheckpointError(
                f"config.json: topk_group is {spec.topk_group}, must be 1 to n_group ({spec.n_group}) and "
                "leave at "
                f"least num_experts_per_tok ({spec.num_experts_per_tok}) experts"
            )
    return spec


def _need(config: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first of `keys` that is there: the same quantity has two names in some families."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise CheckpointError(f"config.json of a {config['model_type']} model lacks the key {' or '.join(keys)}")


def _mixtral(config: Mapping[str, Any]) -> GateSpec:
    return GateSpec(
        system="mixtral",
        num_experts=_need(config, "num_local_experts", "num_experts"),
        num_experts_per_tok=_need(config, "num_experts_per_tok"),
        norm_topk_prob=True,
    )


def _grok_1(config: Mapping[str, Any]) -> GateSpec:
    return GateSpec(
        system="grok_1",
        num_experts=_need(config, "num_experts", "num_local_experts"),
        num_experts_per_tok=_need(config, "num_selected_experts", "num_experts_per_tok"),
    )


def _switch(config: Mapping[str, Any]) -> GateSpec:
    return GateSpec(system="switch", num_experts=_need(config, "num_experts"), num_experts_per_tok=1)


def _qwen3_moe(config: Mapping[str, Any]) -> GateSpec:
    return GateSpec(
        system="qwen3_moe",
        num_experts=_need(config, "num_experts", "num_local_experts"),
        num_experts_per_tok=_need(config, "num_experts_per_tok"),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
    )


def _deepseek_v2(config: Mapping[str, Any]) -> GateSpec:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json: topk_method is {method!r}; DeepSeek-V2 has 'greedy' and 'group_limited_greedy'"
        )
    limited = method == "group_limited_greedy"
    return GateSpec(
        system="deepseek_v2",
        num_experts=_need(config, "n_routed_experts", "num_experts", "num_local_experts"),
        num_experts_per_tok=_need(config, "num_experts_per_tok"),
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
        n_group=_need(config, "n_group") if limited else None,
        topk_group=_need(config, "topk_group") if limited else None,
    )


def _deepseek_v3(config: Mapping[str, Any]) -> GateSpec:
    scoring = config.get("scoring_func", "sigmoid")
    method = config.get("topk_method", "noaux_tc")
    if scoring != "sigmoid" or method != "noaux_tc":
        raise CheckpointError(
            f"config.json: scoring_func {scoring!r} with topk_method {method!r} is not a DeepSeek-V3 gate; "
            "that is "
            "'sigmoid' with 'noaux_tc'"
        )
    return GateSpec(
        system="deepseek_v3",
        num_experts=_need(config, "n_routed_experts", "num_local_experts", "num_experts"),
        num_experts_per_tok=_need(config, "num_experts_per_tok"),
        norm_topk_prob=bool(config.get("norm_topk_prob", True)),
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
        n_group=_need(config, "n_group"),
        topk_group=_need(config, "topk_group"),
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any]], GateSpec]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "grok-1": _grok_1,
    "switch_transformers": _switch,
}
