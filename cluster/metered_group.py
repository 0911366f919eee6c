"""An expert group that counts its calls, for the autoscaling policies."""

from __future__ import annotations

import torch

from cluster.autoscale.meter import GroupMeter
from experts.group import ExpertGroup
from experts.ops.backend import ExpertBackend
from experts.spec import ExpertCall, ExpertSpec


class MeteredGroup(ExpertGroup):
    """See ExpertGroup; every call goes through `meter`."""

    def __init__(self, group: int, spec: ExpertSpec, backend: ExpertBackend, meter: GroupMeter) -> None:
        super().__init__(group, spec, backend)
        self._meter = meter

    def forward(self, call: ExpertCall) -> torch.Tensor:
        accepted, rows = self._meter.accept(), 0
        try:
            partial_TH = super().forward(call)
            rows = len(call.token_rows_R)
            return partial_TH
        finally:
            self._meter.answer(accepted, rows)
