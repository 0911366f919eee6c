"""Decode steps on the CPU: all MoE layers as one compiled call, experts included, where groups are on this machine.

Between two layers a core's caches are full of weights: the Python that leads from one to the next takes longer than it
looks. What is no ordinary step, and what does not go its ordinary way, is left to the layers one by one.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.serving.attention_batch import AttentionBatch
from cluster.serving.compiled_layer import CompiledLayer
from cluster.serving.compiled_mlp import CompiledMlp
from cluster.serving.moe_block import MoeBlock, RouterConnection
from experts.ops.cpu_threads import ThreadTeam
from router_service.gating.compiled_gate import CompiledGate
from router_service.gating.gate import Gate
from router_service.lane_run import LaneRun
from router_service.router import Router


class CompiledDecode:
    """The MoE layers at the end of a model: `first` and all after it."""

    def __init__(
        self, first: int, layers: Sequence[CompiledLayer], gate: CompiledGate, router: Router, team: ThreadTeam
    ) -> None:
        # Loads LLVM, which a GPU's process does not need.
        from cluster.serving._numba.decode_layers import compile_decode_layers

        self.first = first
        self._layers = layers
        self._blocks: list[Any] = [layer.mlp for layer in layers]
        self._numbers = tuple(block.layer for block in self._blocks)
        self._router = router
        self._team = team
        self._constants = tuple(map(_stacked, zip(*(layer.constants for layer in layers), strict=True)))
        self._shared: CompiledMlp | None = self._blocks[0].shared_experts
        self._addresses = np.zeros((len(layers), 6, 1), np.int64)
        if self._shared is not None:
            self._addresses = np.stack([block.shared_experts.addresses for block in self._blocks])
        formats = None if self._shared is None else self._shared.formats
        self._compiled = compile_decode_layers(layers[0].attention, gate.formula.kind, formats)

    @classmethod
    def of(
        cls, layers: Sequence[Any], gates: Mapping[int, Gate], router: object, team: ThreadTeam
    ) -> CompiledDecode | None:
        """None where a model's last layers are not alike, or their experts not to be reached by compiled code."""
        if not isinstance(router, Router) or not router.has_lanes:
            return None
        first = next((at for at, layer in enumerate(layers) if isinstance(layer.mlp, MoeBlock)), len(layers))
        kinds = {_kind(layer, gates) for layer in layers[first:]}
        if len(kinds) != 1 or None in kinds:
            return None
        gate = gates[layers[first].mlp.layer]
        assert isinstance(gate, CompiledGate)
        return cls(first, layers[first:], gate, router, team)

    def run(
        self, hidden_1TH: torch.Tensor, rope: Any, batch: AttentionBatch, connection: RouterConnection
    ) -> tuple[torch.Tensor, int] | None:
        """Hidden states after some layers, at least one, and the number of the next; None where it is not to be done
        here. Raises what the router raises."""
        from cluster.serving._numba.decode_layers import NOT_ASKED
        from experts.wire._numba.add_answers import LATE, SUMMED

        num_tokens, shared = batch.num_tokens, self._shared
        if batch.prefill_spans or connection.overlaps or not (shared is None or shared.takes(num_tokens)):
            return None
        # Hidden states before a layer; after its attention; what its MLP gets; what its experts make of that.
        states_4TH = torch.empty(4, *hidden_1TH.shape[1:])
        states_4TH[0] = hidden_1TH[0]
        shared_out_TP = np.empty((num_tokens, 0 if shared is None else shared.num_columns), np.float32)
        times_L5 = np.zeros((len(self._layers), 5))
        lane = self._router.run(self._numbers, hidden_1TH[0])
        if lane is None:
            return None
        try:
            done, ended = self._run(states_4TH, rope, batch, lane, shared_out_TP, times_L5)
        except BaseException:
            lane.leave()
            raise
        attention_L, asking_L, _, waiting_L = np.diff(times_L5[: done + 1]).T
        batch.seconds += float(attention_L.sum())
        connection.send_s += float(asking_L.sum())
        connection.wait_s += float(waiting_L[:done].sum())
        latencies = (times_L5[:done, 4] - times_L5[:done, 1]).tolist()
        hidden_TH, residual_TH, mlp_in_TH, combined_TH = states_4TH
        if ended == SUMMED:
            lane.end(num_tokens, latencies)
            return hidden_TH[None], self.first + done
        if ended == LATE:
            pending = lane.late(done, mlp_in_TH, latencies, times_L5[done, 1], combined_TH.numpy())
        else:
            pending = lane.again(done, mlp_in_TH, latencies)
        made_TH = connection.receive(pending)
        if ended == NOT_ASKED:
            shared_TH = None if shared is None else self._blocks[done].shared_experts(mlp_in_TH)
        else:
            shared_TH = None if shared is None else torch.from_numpy(shared_out_TP)[:, : made_TH.shape[1]]
        return residual_TH.add_(made_TH if shared_TH is None else made_TH + shared_TH)[None], self.first + done + 1

    def _run(
        self,
        states_4TH: torch.Tensor,
        rope: Any,
        batch: AttentionBatch,
        lane: LaneRun,
        shared_out_TP: Any,
        times_L5: Any,
    ) -> tuple[int, int]:
        """How many layers ended as they should, and how the one after them ended; raises what a helper raised."""
        from cluster.serving._numba.decode_layers import ENDS

        layer, shared, num_tokens = self._layers[0], self._shared, batch.num_tokens
        hidden_TH, residual_TH, mlp_in_TH, combined_TH = states_4TH.numpy()
        parts_LP6, slots_T, positions_T = layer.decode_parts(batch, len(self._layers))
        angles = tuple(each[0].contiguous().numpy() for each in layer.angles(rope))
        work = layer.work_for(num_tokens)
        inner = () if shared is None else shared.work_for(num_tokens)
        experts = (
            *(self._addresses, np.zeros(2, np.int64) if shared is None else shared.panels, np.array([0, num_tokens])),
            *(np.arange(num_tokens, dtype=np.int32), *(inner or (shared_out_TP,) * 3), shared_out_TP),
        )
        tickets = np.zeros(1, np.int64)
        num_helpers = min(self._team.num_threads, parts_LP6.shape[1]) - 1
        ours, theirs = socket.socketpair() if num_helpers else (None, None)
        caller, result = threading.get_ident(), -1

        def work_along(_: int) -> None:
            nonlocal result
            if threading.get_ident() != caller:
                assert theirs is not None
                try:
                    self._compiled.help(
                        *(self._compiled.code, theirs.fileno(), tickets, parts_LP6, hidden_TH, residual_TH, mlp_in_TH),
                        *(self._constants, *angles, slots_T, positions_T, work),
                    )
                except BaseException:
                    theirs.shutdown(socket.SHUT_RDWR)  # the caller waits for this one, the others for the caller
                    raise
            elif result < 0:  # the helpers' work, where they wake late, is done with ours
                try:
                    result = self._compiled.run(
                        *(self._compiled.code, hidden_TH, residual_TH, mlp_in_TH, combined_TH),
                        *(self._constants, work, *angles),
                        *(parts_LP6, slots_T, positions_T, tickets, -1 if ours is None else ours.fileno()),
                        *(num_helpers, *lane.arguments, experts, times_L5),
                    )
                finally:
                    if ours is not None:
                        ours.close()

        try:
            self._team.run(work_along, num_helpers + 1)
        finally:
            for end in filter(None, (ours, theirs)):
                end.close()
        return divmod(result, ENDS)


def _stacked(constants: Sequence[Any]) -> npt.NDArray[Any]:
    """Every layer's of a constant; what compiled functions get as float32 they get so here."""
    stacked = np.stack(constants)
    return stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked


def _kind(layer: Any, gates: Mapping[int, Gate]) -> tuple[Any, ...] | None:
    """What layers of one call have in common; None for one that cannot be part of any."""
    if not isinstance(layer, CompiledLayer) or not isinstance(layer.mlp, MoeBlock):
        return None
    gate, shared = gates.get(layer.mlp.layer), layer.mlp.shared_experts
    if not isinstance(gate, CompiledGate) or not (shared is None or isinstance(shared, CompiledMlp)):
        return None
    return layer.attention, gate.formula.kind, None if shared is None else (shared.formats, shared.sizes)
