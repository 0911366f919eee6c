"""An expert group that counts its calls, for the autoscaling policies."""

from __future__ import annotations

import torch

from cluster.autoscale.meter import GroupMeter
from experts.group import ExpertGroup
from experts.ops.backend import ExpertBackend
from experts.small_calls import SmallAnswer
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

    def answer(self, request: bytes) -> SmallAnswer | None:
        accepted, answer = self._meter.accept(), None
        try:
            answer = super().answer(request)
            return answer
        finally:
            if answer is None:
                self._meter.withdraw()
            else:
                self._meter.answer(accepted, answer.num_rows)
