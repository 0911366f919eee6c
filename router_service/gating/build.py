"""From a gate's spec and weights to the gate."""

from __future__ import annotations

import torch

from experts.errors import CheckpointError
from router_service.gating.deepseek_v2 import DeepseekV2Gate
from router_service.gating.deepseek_v3 import DeepseekV3Gate
from router_service.gating.gate import Gate, GateSpec
from router_service.gating.mixtral import MixtralGate
from router_service.gating.qwen3_moe import Qwen3MoeGate


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
    match spec.system:
        case "mixtral":
            return MixtralGate(spec, weight_EH)
        case "qwen3_moe":
            return Qwen3MoeGate(spec, weight_EH)
        case "deepseek_v2":
            return DeepseekV2Gate(spec, weight_EH)
        case "deepseek_v3":
            if bias_E is None:
                raise CheckpointError(
                    "the gate has no e_score_correction_bias; DeepSeek-V3 and Kimi K2 checkpoints carry one per layer"
                )
            return DeepseekV3Gate(spec, weight_EH, bias_E)
