"""How evenly experts' tokens fall on the groups that hold them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from router_service.placement import PlacementTable


def balancedness(expert_tokens: Mapping[int, npt.NDArray[np.int64]], table: PlacementTable) -> float | None:
    """Mean over layers of a layer's mean load over groups by its largest (EPLB's ratio): 1 is even, 1/G all on one.

    expert_tokens: layer -> int64 [E]. An expert's tokens count in equal parts for the groups that hold it. None
    where no layer has tokens.
    """
    ratios = []
    for layer, tokens_E in expert_tokens.items():
        holders = table.holders.get(layer)
        if holders is None or not tokens_E.any():
            continue
        load_G = np.zeros(table.num_groups)
        for tokens, groups in zip(tokens_E.tolist(), holders, strict=True):
            load_G[list(groups)] += tokens / max(1, len(groups))
        ratios.append(load_G.mean() / load_G.max())
    return float(np.mean(ratios)) if ratios else None
