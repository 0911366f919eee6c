"""Experts out of a checkpoint: only those asked for, several at once, each with its checksum."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from experts.errors import CheckpointError
from experts.spec import ExpertKey, ExpertWeights
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import ExpertLayout

SCALE_BLOCK = 128
"""Rows and columns of a float8 scale that backends know; other sizes are widened while they are read."""

_READERS = 4


class LoadedExpert(NamedTuple):
    """An expert from a checkpoint. checksum: CRC-32 of its bytes as the checkpoint holds them."""

    key: ExpertKey
    weights: ExpertWeights
    checksum: int


def load_experts(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    keys: Iterable[ExpertKey],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LoadedExpert]:
    """Read experts in the order of `keys`; at most a few are in memory before the caller takes them.

    progress: called after each expert with (bytes read, bytes of all of `keys`)

    Raises CheckpointError naming the file and the tensor that is missing, truncated or mis-shaped.
    """
    keys = list(keys)
    sizes = [_nbytes(checkpoint, layout, key) for key in keys]
    total, done = sum(sizes), 0
    waiting = deque(keys)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="load-experts") as pool:
        running = deque(pool.submit(_load, checkpoint, layout, waiting.popleft()) for _ in keys[: 2 * _READERS])
        try:
            for size in sizes:
                loaded = running.popleft().result()
                if waiting:
                    running.append(pool.submit(_load, checkpoint, layout, waiting.popleft()))
                done += size
                if progress:
                    progress(done, total)
                yield loaded
        finally:
            for future in running:
                future.cancel()


def _names(layout: ExpertLayout, key: ExpertKey) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(part, tensor name, shape of the expert's share) for every tensor of an expert.

    part: gate, up or down, or one of those with `_bias` or `_scale`
    """
    if key.expert not in range(layout.experts_per_layer.get(key.layer, 0)):
        raise CheckpointError(f"the checkpoint has no expert {key.expert} in layer {key.layer}")
    spec, projections = layout.spec, layout.projections
    prefix = layout.prefixes[key.layer] + ("" if layout.fused else f"{key.expert}.")
    up_rows = spec.intermediate_size
    if spec.gated and projections.gate is None:
        up_rows *= 2
    parts = [("up", projections.up, (up_rows, spec.hidden_size))]
    if projections.gate is not None:
        parts.insert(0, ("gate", projections.gate, (up_rows, spec.hidden_size)))
    parts.append(("down", projections.down, (spec.hidden_size, spec.intermediate_size)))
    for part, name, shape in parts:
        yield part, f"{prefix}{name}{projections.weight}", shape[::-1] if layout.transposed else shape
        if spec.bias:
            yield f"{part}_bias", f"{prefix}{name}{projections.bias}", shape[:1]
        if layout.scale_block:
            blocks = tuple(-(-size // block) for size, block in zip(shape, layout.scale_block, strict=True))
            yield f"{part}_scale", f"{prefix}{name}.weight_scale_inv", blocks


def _nbytes(checkpoint: Checkpoint, layout: ExpertLayout, key: ExpertKey) -> int:
    total = sum(checkpoint.nbytes(name) for _, name, _ in _names(layout, key))
    return total // layout.experts_per_layer[key.layer] if layout.fused else total


def _load(checkpoint: Checkpoint, layout: ExpertLayout, key: ExpertKey) -> LoadedExpert:
    tensors: dict[str, torch.Tensor] = {}
    checksum = 0
    for part, name, shape in _names(layout, key):
        found = checkpoint.shape(name)
        expected = (layout.experts_per_layer[key.layer], *shape) if layout.fused else shape
        if found != expected:
            raise CheckpointError(
                f"{checkpoint.path(name)}: tensor {name!r} has shape {list(found)}, but {list(expected)} is "
                "expected from the checkpoint's other experts; the file is damaged or another model's"
            )
        tensor = checkpoint.read(name, key.expert if layout.fused else None)
        checksum = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, checksum)
        tensors[part] = tensor
    return LoadedExpert(key, _assemble(layout, tensors), checksum)


def _assemble(layout: ExpertLayout, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
    """Parts as read to ExpertWeights: out x in, gate over up, scales only in blocks that backends know."""
    if layout.transposed:
        tensors = {part: t.t().contiguous() if t.dim() == 2 else t for part, t in tensors.items()}
    if layout.interleaved:
        for part in ("up", "up_bias"):
            if part in tensors:
                tensors[part] = torch.cat([tensors[part][0::2], tensors[part][1::2]])
    block = layout.scale_block
    rows_fit = "gate" not in tensors or layout.spec.intermediate_size % SCALE_BLOCK == 0
    if block and (block != (SCALE_BLOCK, SCALE_BLOCK) or not rows_fit):
        for part in ("gate", "up", "down"):
            if part in tensors:
                tensors[part] = _widen(tensors[part], tensors.pop(f"{part}_scale"), block)
    return ExpertWeights(
        up_2IH=_joined(tensors, ""),
        down_HI=tensors["down"],
        up_bias_2I=_joined(tensors, "_bias") if "up_bias" in tensors else None,
        down_bias_H=tensors.get("down_bias"),
        up_scale=_joined(tensors, "_scale") if "up_scale" in tensors else None,
        down_scale=tensors.get("down_scale"),
    )


def _joined(tensors: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    if f"gate{kind}" not in tensors:
        return tensors[f"up{kind}"]
    # Concatenated as bytes: float8 has no `cat`.
    gate, up = tensors[f"gate{kind}"], tensors[f"up{kind}"]
    joined = torch.cat([gate.view(torch.uint8), up.view(torch.uint8)])
    return joined.view(gate.dtype)


def _widen(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = weight.shape
    scale = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * scale
