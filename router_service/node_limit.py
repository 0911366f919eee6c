"""Device-limited routing by node: a token may only use experts on its best M nodes. Lossy.

Source: DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), section 2.2.2: choose the M devices that hold the experts
with the highest scores, then the top K among the experts on them; here a device is a node.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch


class NodeLimit:
    """A `ChoiceLimit` for any gate.

    held_EN:   bool, which nodes hold each expert
    max_nodes: M. Where a token's best M nodes hold fewer than K experts that its gate allows, its next best nodes are
               open too, until they are K
    """

    def __init__(self, held_EN: npt.NDArray[np.bool_], max_nodes: int) -> None:
        self._held_NE = torch.from_numpy(held_EN).T
        self._max_nodes = max_nodes

    def __call__(self, choice_TE: torch.Tensor, top_k: int) -> torch.Tensor:
        num_nodes = len(self._held_NE)
        if self._max_nodes >= num_nodes:
            return choice_TE
        held_NE = self._held_NE.to(choice_TE.device)
        best_TN = torch.stack([choice_TE.masked_fill(~held_E, -math.inf).amax(dim=-1) for held_E in held_NE], dim=-1)
        nodes_TN = best_TN.argsort(dim=-1, descending=True)
        open_TE = held_NE[nodes_TN[:, : self._max_nodes]].any(dim=1)
        for next_T in nodes_TN[:, self._max_nodes :].T:
            lacking = ((open_TE & (choice_TE != -math.inf)).sum(dim=-1) < top_k).nonzero().squeeze(1)
            if not len(lacking):
                break
            open_TE[lacking] |= held_NE[next_T[lacking]]
        return choice_TE.masked_fill(~open_TE, -math.inf)
