"""The experts that one device holds, and calls to them."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Mapping

import torch

from experts.errors import ExpertNotResident, RequestError
from experts.ops.backend import ExpertBackend
from experts.ops.cpu_backend import CpuBackend
from experts.small_calls import SmallAnswer, SmallCalls
from experts.spec import ExpertCall, ExpertKey, ExpertSpec, ExpertWeights


class ExpertShard:
    """Gives each loaded expert a slot of `backend`. Thread-safe; calls run one at a time."""

    def __init__(self, spec: ExpertSpec, backend: ExpertBackend) -> None:
        self.spec = spec
        self._backend = backend
        self._running = threading.Lock()
        self._changing = threading.Lock()
        self._slots: dict[int, dict[int, int]] = {}
        self._checksums: dict[ExpertKey, int] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._small = SmallCalls(backend) if isinstance(backend, CpuBackend) else None

    @property
    def checksums(self) -> Mapping[ExpertKey, int]:
        """What `load` was told for each expert that is loaded."""
        return self._checksums.copy()

    def load(self, key: ExpertKey, weights: ExpertWeights, checksum: int) -> None:
        """Take an expert into a free slot. Calls go on meanwhile, and see the expert once it is whole."""
        with self._changing:
            assert key not in self._checksums, f"{key} is loaded already"
            slot = heapq.heappop(self._free_slots) if self._free_slots else self._num_slots
            self._num_slots = max(self._num_slots, slot + 1)
            self._backend.load(slot, weights)
            self._checksums[key] = checksum
            self._slots.setdefault(key.layer, {})[key.expert] = slot
            if self._small is not None:
                with self._running:
                    self._small.hold(key, slot)

    def free(self, key: ExpertKey) -> None:
        """Forget an expert, after the call that may be using it."""
        with self._changing, self._running:
            del self._checksums[key]
            slot = self._slots[key.layer].pop(key.expert)
            if self._small is not None:
                self._small.forget(key)
            self._backend.free(slot)
            heapq.heappush(self._free_slots, slot)

    def answer(self, request: bytes) -> SmallAnswer | None:
        """The answer to a serialised ForwardRequest where that can be had at once; else None: `forward` knows why."""
        if self._small is None or not self._running.acquire(blocking=False):
            return None
        try:
            return self._small.answer(request)
        finally:
            self._running.release()

    def forward(self, call: ExpertCall) -> torch.Tensor:
        """`partial_TH` of a call: float32, on the device of `call.hidden_TH`.

        Raises ExpertNotResident for an expert that is not loaded, RequestError for rows of another width.
        """
        if call.hidden_TH.shape[1] != self.spec.hidden_size:
            raise RequestError(
                f"hidden.shape: rows of {call.hidden_TH.shape[1]} values, but these experts take "
                f"{self.spec.hidden_size}",
                "hidden.shape",
            )
        with self._running:
            slots = self._slots.get(call.layer, {})
            try:
                slots_S = [slots[expert] for expert in call.expert_ids_S.tolist()]
            except KeyError as error:
                raise ExpertNotResident(
                    f"expert_ids: expert {error.args[0]} of layer {call.layer} is not held here; "
                    "plan again with a newer placement table",
                    "expert_ids",
                ) from None
            return self._backend.forward(
                call.hidden_TH,
                torch.tensor(slots_S, dtype=torch.int32),
                call.offsets_S1,
                call.token_rows_R,
                call.weights_R,
            )
