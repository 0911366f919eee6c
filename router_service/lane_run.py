"""A small batch that goes through several layers in turn on one lane, for compiled code that goes with it.

What `SmallBatches` does for a layer, with no Python between one layer and the next: `LaneRun.arguments` is all that
compiled code has to know to gate, ask and add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from router_service.counters import RouterCounters
from router_service.desk import Desk, LayerBatches
from router_service.slot_index import IntArray

_NONE: IntArray = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerStack:
    """L layers that one compiled function goes through: gates of one kind and size, slots of like shapes.

    gates, slots: constants of the gates and slots of each, as `cluster.serving` gives them to its compiled code
    """

    layers: tuple[int, ...]
    first: LayerBatches
    numbers_L: npt.NDArray[np.int64]
    gates: tuple[Any, ...]
    slots: tuple[Any, ...]

    @classmethod
    def of(cls, layers: Sequence[int], prepared: Sequence[LayerBatches]) -> LayerStack | None:
        """None where they are not alike."""
        first = prepared[0]
        shapes = {tuple(array.shape for array in each.slots) for each in prepared}
        kinds = {
            (each.gate.formula.kind, each.shape, each.gate.constants[3], *each.gate.constants[5:]) for each in prepared
        }
        if len(shapes) > 1 or len(kinds) > 1:
            return None
        constants = [each.gate.constants for each in prepared]
        panels, scales, biases, _, bias = zip(*(each[:5] for each in constants), strict=True)
        num_panels, (num_groups, best_groups, scale, epsilon) = constants[0][3], constants[0][5:]
        return cls(
            layers=tuple(layers),
            first=first,
            numbers_L=np.array(layers),
            gates=(
                *(np.stack(each) for each in (panels, scales, biases)),
                np.array([num_panels, num_groups, best_groups]),
                np.stack(bias),
                np.array([scale, epsilon], np.float32),
            ),
            slots=tuple(np.stack(each) for each in zip(*(each.slots for each in prepared), strict=True)),
        )


class Result(Protocol):
    """A batch that is out, see `SmallBatch`."""

    def result(self) -> torch.Tensor: ...
    def cancel(self) -> None: ...


class _Batches(Protocol):
    """`SmallBatches`, which lends the desk."""

    counters: RouterCounters

    @property
    def again(self) -> Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], Result]: ...
    def leave(self, desk: Desk, *, usable: bool) -> None: ...
    def resume(
        self, desk: Desk, layer: int, hidden_TH: torch.Tensor, began: float, out_TH: npt.NDArray[np.float32]
    ) -> Result: ...


class LaneRun:
    """Belongs to one thread, which calls one of `end`, `late`, `again` and `leave`, once.

    rows_LE, shares_LG3: what compiled code writes of each layer, see `SplitRows`
    """

    def __init__(self, desk: Desk, stack: LayerStack, batches: _Batches, *, patience_ms: int) -> None:
        self._batches = batches
        self._desk = desk
        self._stack = stack
        self._patience_ms = patience_ms
        count, split = len(stack.layers), desk.split
        self.shares_LG3 = np.zeros((count, *split.shares_G3.shape), np.int64)
        self.rows_LE = np.zeros((count, *split.rows_E.shape), np.int64)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """From `layers` to `lane`, see `cluster.serving._numba.decode_layers`."""
        desk, stack = self._desk, self._stack
        return (
            stack.numbers_L,
            stack.gates,
            stack.slots,
            (desk.logits_TP, desk.expert_ids_TK, desk.weights_TK, _NONE),
            tuple(desk.split[:5]),
            self.shares_LG3,
            self.rows_LE,
            (
                *(desk.lane.sockets_G, np.array([desk.call_id, self._patience_ms])),
                *(desk.message, desk.values, desk.progress),
            ),
        )

    def end(self, num_tokens: int, seconds_L: Sequence[float]) -> None:
        """All layers have their answers, each after so long."""
        self._count(num_tokens, seconds_L)
        self._desk.call_id += len(seconds_L)
        self._batches.leave(self._desk, usable=True)

    def late(
        self,
        number: int,
        hidden_TH: torch.Tensor,
        seconds_L: Sequence[float],
        began: float,
        out_TH: npt.NDArray[np.float32],
    ) -> Result:
        """The first `number` layers have their answers; what is there of the next one's sum is in `out_TH`.

        began: when that one was gated, on the monotonic clock
        """
        self._count(len(hidden_TH), seconds_L)
        desk = self._desk
        desk.call_id += number + 1
        desk.split.shares_G3[:] = self.shares_LG3[number]
        desk.split.rows_E[:] = self.rows_LE[number]
        return self._batches.resume(desk, self._stack.layers[number], hidden_TH, began, out_TH)

    def again(self, number: int, hidden_TH: torch.Tensor, seconds_L: Sequence[float]) -> Result:
        """The first `number` layers have their answers; the next one is to be asked in the ordinary way."""
        self._count(len(hidden_TH), seconds_L)
        self.leave()
        return self._batches.again(self._stack.layers[number], hidden_TH, *self._desk.choice(len(hidden_TH)))

    def leave(self) -> None:
        """Nobody wants its answers any more."""
        self._batches.leave(self._desk, usable=False)

    def _count(self, num_tokens: int, seconds_L: Sequence[float]) -> None:
        layers, hidden_size = self._stack.layers[: len(seconds_L)], self._stack.first.shape[0]
        self._batches.counters.small_batches(layers, self.rows_LE, self.shares_LG3, num_tokens, hidden_size, seconds_L)
