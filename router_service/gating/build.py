"""From a gate's spec and weights to the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from experts.errors import CheckpointError
from router_service.gating.compiled_gate import CompiledGate, GateFormula
from router_service.gating.deepseek_v2 import DeepseekV2Gate
from router_service.gating.deepseek_v3 import DeepseekV3Gate
from router_service.gating.deepseek_v4 import DeepseekV4Gate
from router_service.gating.gate import Gate, GateSpec
from router_service.gating.glam import GlamGate
from router_service.gating.grok_1 import Grok1Gate
from router_service.gating.gshard import GShardGate
from router_service.gating.mixtral import MixtralGate
from router_service.gating.qwen3_moe import Qwen3MoeGate
from router_service.gating.shazeer import ShazeerGate
from router_service.gating.switch import SwitchGate

_GATES: Mapping[str, Callable[[GateSpec, torch.Tensor], Gate]] = {
    "shazeer": ShazeerGate,
    "gshard": GShardGate,
    "switch": SwitchGate,
    "glam": GlamGate,
    "mixtral": MixtralGate,
    "grok_1": Grok1Gate,
    "qwen3_moe": Qwen3MoeGate,
    "deepseek_v2": DeepseekV2Gate,
}
_BIASED_GATES: Mapping[str, Callable[[GateSpec, torch.Tensor, torch.Tensor], Gate]] = {
    "deepseek_v3": DeepseekV3Gate,
    "deepseek_v4": DeepseekV4Gate,
}


def build_gate(spec: GateSpec, weight_EH: torch.Tensor, bias_E: torch.Tensor | None) -> Gate:
    """The gate of `spec.system`.

    weight_EH: the gate's linear layer, any float dtype, kept as float32 on its device
    bias_E:    `e_score_correction_bias` where the system has one, else None
    Raises CheckpointError where the shapes do not fit the spec.
    """
    if weight_EH.dim() != 2 or weight_EH.shape[0] != spec.num_experts:
        raise CheckpointError(
            f"gate weight has shape {tuple(weight_EH.shape)}, the config's {spec.num_experts} experts need "
            f"[{spec.num_experts}, hidden_size]; use the config.json that belongs to this checkpoint"
        )
    if bias_E is not None and bias_E.shape != (spec.num_experts,):
        raise CheckpointError(
            f"gate bias has shape {tuple(bias_E.shape)}, expected [{spec.num_experts}]; use the "
            "config.json that "
            "belongs to this checkpoint"
        )
    if spec.system not in _BIASED_GATES:
        return _compiled(_GATES[spec.system](spec, weight_EH))
    if bias_E is None:
        raise CheckpointError(
            f"the gate of {spec.system} has no e_score_correction_bias; its checkpoints carry one per layer"
        )
    return _compiled(_BIASED_GATES[spec.system](spec, weight_EH, bias_E))


def _compiled(gate: Gate) -> Gate:
    """`gate`, compiled where its file says how."""
    formula: GateFormula | None = getattr(gate, "formula", None)
    return gate if formula is None else CompiledGate(gate, formula)
