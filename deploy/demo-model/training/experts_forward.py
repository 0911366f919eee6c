"""A training forward for routed experts: rows sorted by expert, one matmul per expert and projection.

Registered with transformers' experts interface; on a CPU about three times the speed of its own forwards,
because both permutations and their gradients are plain row gathers (no index_add).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Permute(torch.autograd.Function):
    """rows[order]; the gradient of a permutation is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def sorted_experts_forward(module: Any, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's K gated experts, [T, H] in hidden's dtype."""
    num_tokens, top_k = expert_ids_TK.shape
    order_R = expert_ids_TK.flatten().argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel())
    counts = torch.bincount(expert_ids_TK.flatten(), minlength=module.num_experts).tolist()
    rows_RH = hidden_TH.unsqueeze(1).expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)
    sorted_RH = _Permute.apply(rows_RH, order_R, inverse_R)
    outputs: list[Tensor] = []
    for expert, rows in enumerate(sorted_RH.split(counts)):
        gate, up = nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
        outputs.append(nn.functional.linear(nn.functional.silu(gate) * up, module.down_proj[expert]))
    routed_RH = _Permute.apply(torch.cat(outputs), inverse_R, order_R)
    return torch.bmm(weights_TK.to(hidden_TH.dtype).unsqueeze(1), routed_RH.view(num_tokens, top_k, -1)).squeeze(1)
