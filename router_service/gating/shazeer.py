"""Noisy top-k gating: softmax over the K largest logits, which noise may perturb.

Source: Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), equations 3 to 5. The noise
balances load in training; serving leaves it off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from router_service.gating.choice import choose
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class ShazeerGate:
    """weight_EH: W_g, transposed.

    noise_EH: W_noise, transposed; None: no noise. generator: of the noise, on the hidden states' device
    """

    def __init__(
        self,
        spec: GateSpec,
        weight_EH: torch.Tensor,
        noise_EH: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._top_k = spec.num_experts_per_tok
        self._logits = GateLogits(weight_EH)
        self._noise_logits = None if noise_EH is None else GateLogits(noise_EH)
        self._generator = generator

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        logits_TE = self._logits(hidden_TH)
        if self._noise_logits is not None:
            normal_TE = torch.randn(logits_TE.shape, generator=self._generator, device=logits_TE.device)
            logits_TE = logits_TE + normal_TE * F.softplus(self._noise_logits(hidden_TH))
        chosen = choose(logits_TE, logits_TE, self._top_k, limit)
        return chosen._replace(weights_TK=chosen.weights_TK.softmax(dim=-1))
