"""The parts of one node's groups, bundled so that every token crosses to the node once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experts.node_call import NodeCall, NodeShare
from router_service.dispatch import GroupPart
from router_service.slot_index import IntArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NodePart:
    """Parts of one layer and one node, ascending by group.

    tokens_T: int32, ascending, the batch's tokens that any of the parts needs; None: all of them
    """

    parts: tuple[GroupPart, ...]
    tokens_T: IntArray | None
    num_tokens: int

    def call(self, hidden_TH: torch.Tensor, addresses: Sequence[str]) -> NodeCall:
        """The call to send. hidden_TH: the whole batch; addresses: of the parts' groups, the receiver's empty."""
        if self.tokens_T is not None:
            rows = torch.from_numpy(self.tokens_T).to(hidden_TH.device)
            node_hidden_TH = hidden_TH.index_select(0, rows)
        else:
            node_hidden_TH = hidden_TH
        return NodeCall(
            layer=self.parts[0].layer,
            hidden_TH=node_hidden_TH,
            shares=tuple(
                NodeShare(
                    group=part.group,
                    address=address,
                    tokens_T=self._rows_of(part),
                    expert_ids_S=torch.from_numpy(part.expert_ids_S),
                    offsets_S1=torch.from_numpy(part.offsets_S1),
                    token_rows_R=torch.from_numpy(part.token_rows_R),
                    weights_R=torch.from_numpy(part.weights_R),
                )
                for part, address in zip(self.parts, addresses, strict=True)
            ),
        )

    def _rows_of(self, part: GroupPart) -> torch.Tensor | None:
        """Rows of the node's hidden states that `part` needs; None: all."""
        if part.tokens_T is None or len(part.tokens_T) == self.num_tokens:
            return None
        if self.tokens_T is None:
            return torch.from_numpy(part.tokens_T)
        return torch.from_numpy(np.searchsorted(self.tokens_T, part.tokens_T).astype(np.int32))


def bundle(parts: Sequence[GroupPart], num_tokens: int) -> NodePart:
    """Bundle one node's parts of a batch of `num_tokens` tokens."""
    tokens_T: IntArray | None = None
    if len(parts) == 1:
        tokens_T = parts[0].tokens_T
    elif all(part.tokens_T is not None for part in parts):
        marked = np.zeros(num_tokens, dtype=bool)
        for part in parts:
            marked[part.tokens_T] = True
        tokens = np.flatnonzero(marked).astype(np.int32)
        tokens_T = tokens if len(tokens) < num_tokens else None
    return NodePart(parts=tuple(parts), tokens_T=tokens_T, num_tokens=num_tokens if tokens_T is None else len(tokens_T))


def num_distinct_tokens(parts: Sequence[GroupPart], num_tokens: int) -> int:
    """How many tokens of a batch of `num_tokens` any of `parts` needs."""
    marked = np.zeros(num_tokens, dtype=bool)
    for part in parts:
        if part.tokens_T is None:
            return num_tokens
        marked[part.tokens_T] = True
    return int(np.count_nonzero(marked))
