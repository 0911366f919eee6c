"""From a load measured in replicas to a whole number of them, without flapping."""

from __future__ import annotations

import math

_ROUNDING = 1e-9  # sums of floats that mean a whole number must not cost a replica


def replicas_for(load: float, target: int, tolerance: float) -> int:
    """Replicas for `load` (1.0 fills one replica), when there are `target` now.

    Grows once the load exceeds the target by the fraction `tolerance`; shrinks once the load fits in fewer
    replicas with that fraction of them to spare. Between the two the target stands, so a load that hovers at
    a boundary moves nothing.
    """
    if load > target * (1 + tolerance):
        return math.ceil(load - _ROUNDING)
    return min(target, max(1, math.ceil(load / (1 - tolerance) - _ROUNDING)))
