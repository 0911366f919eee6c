"""Experts on a CUDA card: slots in its memory, Triton's grouped matmuls, CUDA graphs for decode sizes."""

from __future__ import annotations

import threading

import torch

from experts.errors import ConfigError
from experts.ops._triton.combine import combine
from experts.ops._triton.epilogue import ACTIVATIONS
from experts.ops._triton.grouped_matmul import grouped_matmul
from experts.ops._triton.tiles import tile_table
from experts.ops.decode_graph import DecodeGraph
from experts.ops.known_cards import ROW_BUCKETS
from experts.ops.projection import Projection
from experts.ops.slot_format import SlotFormat
from experts.ops.slots import SlotStorage
from experts.ops.tile_config import TileConfig
from experts.ops.tuning import Tuning
from experts.quant.scheme import Scheme
from experts.quant.schemes import build_scheme
from experts.spec import ExpertSpec, ExpertWeights

MAX_GRAPH_ROWS = 256


class TritonBackend:
    """An ExpertBackend (see backend.py) for a CUDA card.

    dtype: of the arithmetic and of unquantised weights, bf16 or fp16 (float32 works, slowly).
    quantization: a name of `experts.quant.schemes`. With `none`, a checkpoint's fp8 blocks stay fp8 where the card has
        fp8 (compute capability 8.9) and are widened to dtype elsewhere.

    The first load settles the format, compiles every kernel that a call can need and captures the decode sizes, so that
    no call waits for a compiler.
    """

    def __init__(self, spec: ExpertSpec, *, device: torch.device, dtype: torch.dtype, quantization: str) -> None:
        """Raises ConfigError for an activation or a scheme that the card's kernels do not have."""
        if spec.activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act: the GPU kernels have no {spec.activation!r}; they have {', '.join(ACTIVATIONS)}"
            )
        self._spec = spec
        self._device = torch.device(device.type, device.index or 0) if device.type == "cuda" else device
        self._dtype = dtype
        self._scheme = build_scheme(quantization, dtype)
        if self._scheme.name in ("fp8", "fp8_block") and not self._has_fp8():
            raise ConfigError(
                f"model.quantization: {quantization!r} needs a card with fp8 (compute capability 8.9 or later); "
                "use int8, int4 or none"
            )
        self._settled = False
        self._format: SlotFormat
        self._storage: SlotStorage
        self.tuning: Tuning
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """The card."""
        return self._device

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """See ExpertBackend.load. Raises ConfigError when the card's memory is full."""
        first = not self._settled
        if first:
            self._settle(kept_fp8=weights.up_scale is not None)
        self._format.write(self._storage.place(slot), weights)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            if first:
                self.warm(slot)

    def free(self, slot: int) -> None:
        """See ExpertBackend.free."""
        self._storage.free(slot)

    def use_threads(self, num_threads: int) -> None:
        """See ExpertBackend.use_threads."""

    def forward(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """See ExpertBackend.forward."""
        num_rows, num_groups = token_rows_R.numel(), slots_S.numel()
        if num_rows == 0:
            return hidden_TH.new_zeros(hidden_TH.shape, dtype=torch.float32)
        inputs = (hidden_TH, slots_S, offsets_S1, token_rows_R, weights_R)
        size = (_power_of_two(max(num_rows, len(hidden_TH))), _power_of_two(num_groups))
        with self._lock:
            graph = self._graphs.get(size)
            if graph is not None:
                partial_TH = graph.replay(*inputs)
                return partial_TH.clone() if hidden_TH.device == self._device else partial_TH.to(hidden_TH.device)
            hidden_TH = hidden_TH.to(self._device, self._dtype).contiguous()
            rest = (tensor.to(self._device).contiguous() for tensor in inputs[1:])
            return self.run(hidden_TH, *rest).to(inputs[0].device)

    def run(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` of contiguous tensors that are on the card, hidden_TH in dtype: launches alone, no host sync."""
        rows_per_expert = -(-token_rows_R.numel() // slots_S.numel())
        tables: dict[int, torch.Tensor] = {}
        x = hidden_TH
        for projection in self.projections:
            config = self.tuning.choose(projection, rows_per_expert)
            if config.rows not in tables:
                tables[config.rows] = self.tiles(slots_S, offsets_S1, token_rows_R.numel(), config)
            x = self.project(projection, config, x, token_rows_R, tables[config.rows])
        return combine(x, offsets_S1, token_rows_R, weights_R, len(hidden_TH))

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """Up and down, once a first expert is loaded."""
        return self._format.up, self._format.down

    def tiles(self, slots_S: torch.Tensor, offsets_S1: torch.Tensor, num_rows: int, config: TileConfig) -> torch.Tensor:
        """The tile table of a call (`_triton.tiles`) for `config`."""
        return tile_table(slots_S, offsets_S1, self._storage.addresses, num_rows=num_rows, block_rows=config.rows)

    def project(
        self,
        projection: Projection,
        config: TileConfig,
        x: torch.Tensor,
        token_rows_R: torch.Tensor,
        tiles: torch.Tensor,
    ) -> torch.Tensor:
        """One projection of all rows: x is [T, H] for up and [R, I] for down; [R, I] or [R, H] comes back."""
        # TMA reads rows at multiples of 16 bytes: pad the up projection's. The result is read by `combine`, as it is.
        columns = projection.out_columns
        stride = -(-columns // 16) * 16 if projection is self._format.up else columns
        out = torch.empty((token_rows_R.numel(), stride), dtype=self._dtype, device=self._device)[:, :columns]
        scheme = self._format.scheme
        grouped_matmul(scheme.name, projection, config, scheme.codes_dtype, x, token_rows_R, tiles, out)
        return out

    def warm(self, slot: int) -> None:
        """Compile what calls can need and capture the decode sizes; `slot` holds weights."""
        for rows in ROW_BUCKETS:
            self.run(*self._example(slot, rows))
        self._graphs.clear()
        pool = torch.cuda.graph_pool_handle()
        sizes = [1 << i for i in range(MAX_GRAPH_ROWS.bit_length())]
        for num_rows, num_groups in [(rows, groups) for rows in sizes for groups in sizes if groups <= rows]:
            self._graphs[num_rows, num_groups] = DecodeGraph(
                self.run,
                num_rows=num_rows,
                num_groups=num_groups,
                hidden_size=self._spec.hidden_size,
                dtype=self._dtype,
                device=self._device,
                resident_slot=slot,
                pool=pool,
            )
        torch.cuda.synchronize(self._device)

    def _example(self, slot: int, rows: int) -> tuple[torch.Tensor, ...]:
        device = self._device
        return (
            torch.ones((rows, self._spec.hidden_size), dtype=self._dtype, device=device),
            torch.tensor([slot], dtype=torch.int32, device=device),
            torch.tensor([0, rows], dtype=torch.int32, device=device),
            torch.arange(rows, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.float32, device=device),
        )

    def _settle(self, *, kept_fp8: bool) -> None:
        scheme: Scheme = self._scheme
        if kept_fp8 and scheme.name == "none" and self._has_fp8():
            scheme = build_scheme("fp8_block", self._dtype)
        self._format = SlotFormat(self._spec, scheme, ACTIVATIONS[self._spec.activation])
        self._storage = SlotStorage(self._format.layout, self._device)
        self.tuning = Tuning(self._device, scheme.name, self._dtype)
        self._settled = True

    def _has_fp8(self) -> bool:
        return self._device.type != "cuda" or torch.cuda.get_device_capability(self._device) >= (8, 9)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
