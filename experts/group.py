"""An expert group: the slots that live together on one device, as a plain class."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from experts.batcher import Batcher
from experts.ops.backend import ExpertBackend
from experts.shard import ExpertShard
from experts.small_calls import SmallAnswer
from experts.spec import ExpertCall, ExpertKey, ExpertSpec
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import ExpertLayout
from experts.weights.loader import load_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupDescription:
    """What a group is and holds. checksums: of every resident expert, ascending by key."""

    group: int
    device: str
    spec: ExpertSpec
    checksums: Mapping[ExpertKey, int]


class ExpertGroup:
    """Group number `group`, empty until `assign`. Thread-safe."""

    def __init__(self, group: int, spec: ExpertSpec, backend: ExpertBackend) -> None:
        self.group = group
        self.spec = spec
        self._device = backend.device
        self._shard = ExpertShard(spec, backend)
        self._batcher = Batcher(self._shard)
        self._assigning = threading.Lock()

    def assign(
        self,
        layout: ExpertLayout,
        checkpoint: Checkpoint,
        keys: Iterable[ExpertKey],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Hold exactly `keys`: load what is missing, then free what is not named. Calls go on meanwhile.

        progress: called with (bytes loaded, bytes to load)

        Raises CheckpointError; what was loaded by then stays.
        """
        assert layout.spec == self.spec, "a group holds experts of one model"
        with self._assigning:
            wanted = frozenset(keys)
            missing = sorted(wanted - self._shard.checksums.keys())
            for loaded in load_experts(checkpoint, layout, missing, progress):
                self._shard.load(loaded.key, loaded.weights, loaded.checksum)
            for key in sorted(self._shard.checksums.keys() - wanted):
                self._shard.free(key)

    def forward(self, call: ExpertCall) -> torch.Tensor:
        """`partial_TH`, float32, on `call.hidden_TH`'s device. Raises ExpertNotResident or RequestError."""
        return self._batcher.run(call)

    def answer(self, request: bytes) -> SmallAnswer | None:
        """The answer to a small ForwardRequest; None for any that has to be read as `experts.wire.codec` does."""
        return self._shard.answer(request)

    def describe(self) -> GroupDescription:
        """What the group holds now."""
        checksums = dict(sorted(self._shard.checksums.items()))
        return GroupDescription(group=self.group, device=str(self._device), spec=self.spec, checksums=checksums)
