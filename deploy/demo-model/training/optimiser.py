"""Muon for matrices and AdamW for the rest, with float32 master weights of a bfloat16 model.

Muon: Jordan et al. 2024 (momentum, then orthogonalise the update); its scale by shape follows Liu et al.
2025, "Muon is scalable for LLM training", section 2.2, so that one learning rate serves all matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of `update` [..., m, n], roughly (singular values within 0.7 to 1.2)."""
    a, b, c = NEWTON_SCHULZ
    tall = update.size(-2) > update.size(-1)
    x = update.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimiser:
    """Steps a model's parameters; `learning_rate` of a step scales both halves.

    Matrices (stacked experts count as many) take Muon, all else and the embedding AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        muon_lr: float = 0.008,
        adam_lr: float = 0.004,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        self._muon_lr = muon_lr
        self._weight_decay = weight_decay
        self._momentum = momentum
        self._matrices: list[tuple[nn.Parameter, Tensor, Tensor, int]] = []
        self._others: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in parameters:
            master = parameter.detach().float().clone()
            if parameter.ndim < 2 or "embed_tokens" in name or name.endswith("gate.weight"):
                self._others.append((parameter, master))
            else:
                # A fused gate_up_proj holds two matrices that have nothing to do with each other.
                parts = 2 if name.endswith("gate_up_proj") else 1
                self._matrices.append((parameter, master, torch.zeros_like(master), parts))
        self._adam = torch.optim.AdamW(
            [master for _, master in self._others], lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._adam_lr = adam_lr

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the base learning rates; clears the gradients."""
        for parameter, master, momentum, parts in self._matrices:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            momentum.lerp_(gradient, 1 - self._momentum)
            update = gradient.lerp(momentum, self._momentum)  # Nesterov
            rows, columns = master.shape[-2] // parts, master.shape[-1]
            direction = orthogonalise(update.reshape(-1, rows, columns)).view_as(master)
            lr = self._muon_lr * scale
            master.mul_(1 - lr * self._weight_decay)
            master.sub_(direction, alpha=lr * 0.2 * math.sqrt(max(rows, columns)))
        for parameter, master in self._others:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        for group in self._adam.param_groups:
            group["lr"] = self._adam_lr * scale
        self._adam.step()
        for parameter, master, *_ in (*self._matrices, *self._others):
            parameter.copy_(master)
            parameter.grad = None
