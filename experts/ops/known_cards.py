"""Tiles to start from on cards that are known, by scheme and by rows an expert.

Chosen from what compiles for sm_90 without spills and what public kernels use, not yet from timings of ours;
`expertmesh warmup` times the candidates on the card at hand and its choice wins.
"""

from __future__ import annotations

from collections.abc import Mapping

from experts.ops.tile_config import TileConfig

# Rows an expert are rounded up to one of these; the last one stands for any more.
ROW_BUCKETS = (16, 32, 64, 128, 256)

Candidates = Mapping[int, tuple[TileConfig, ...]]


def _decode(rows: int, columns: int, depth: int, stages: int, warps: int = 4) -> TileConfig:
    return TileConfig(kernel="decode", rows=rows, columns=columns, depth=depth, warps=warps, stages=stages)


def _prefill(rows: int, columns: int, depth: int, stages: int, warps: int = 8, programs: int = 1) -> TileConfig:
    return TileConfig(
        kernel="prefill", rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, programs_per_sm=programs
    )


# For each bucket the default first, then what else is worth timing.
_HOPPER_16BIT: Candidates = {
    16: (_decode(16, 64, 128, 5), _decode(16, 128, 128, 4), _decode(16, 64, 64, 8), _decode(16, 128, 64, 6)),
    32: (_decode(32, 64, 128, 5), _decode(32, 128, 128, 4), _decode(32, 128, 64, 6)),
    64: (_decode(64, 128, 64, 5), _decode(64, 128, 128, 3), _prefill(64, 128, 64, 5, 4), _prefill(64, 256, 64, 4)),
    128: (
        _prefill(128, 128, 64, 4),
        _prefill(128, 256, 64, 3),
        _prefill(64, 256, 64, 4),
        _prefill(128, 128, 64, 3, 8, 2),
    ),
    256: (_prefill(128, 256, 64, 3), _prefill(128, 128, 64, 4), _prefill(128, 128, 64, 3, 8, 2)),
}
_HOPPER_FP8_ROW: Candidates = {
    16: (_decode(16, 64, 128, 6), _decode(16, 128, 128, 5), _decode(16, 64, 256, 5)),
    32: (_decode(32, 64, 128, 6), _decode(32, 128, 128, 5)),
    64: (_decode(64, 128, 128, 5), _prefill(64, 128, 128, 4, 4), _prefill(64, 256, 128, 4)),
    128: (_prefill(128, 128, 128, 4), _prefill(128, 256, 128, 3), _prefill(64, 256, 128, 4)),
    256: (_prefill(128, 256, 128, 3), _prefill(128, 128, 128, 4)),
}
_HOPPER_FP8_BLOCK: Candidates = {
    16: (_decode(16, 64, 128, 6), _decode(16, 128, 128, 5)),
    32: (_decode(32, 64, 128, 6), _decode(32, 128, 128, 5)),
    64: (_decode(64, 64, 128, 5), _decode(64, 128, 128, 5, 8), _prefill(64, 128, 128, 4)),
    128: (_prefill(128, 128, 128, 4), _prefill(64, 128, 128, 4)),
    256: (_prefill(128, 128, 128, 4), _prefill(128, 128, 128, 3)),
}
# Weights are widened in registers: the decode kernel at every size.
_HOPPER_WIDENED: Candidates = {
    16: (_decode(16, 64, 128, 5), _decode(16, 128, 128, 4)),
    32: (_decode(32, 64, 128, 5), _decode(32, 128, 128, 4)),
    64: (_decode(64, 64, 128, 4), _decode(64, 128, 128, 3, 8)),
    128: (_decode(128, 128, 128, 3, 8), _decode(128, 64, 128, 3)),
    256: (_decode(128, 128, 128, 3, 8), _decode(128, 64, 128, 3)),
}
# 164 KiB of shared memory, no fp8 tensor cores. Without TMA, Triton reads descriptors by pointer and does not prefetch
# them, so the decode kernel, which prefetches both operands, goes first at every size.
_AMPERE_16BIT: Candidates = {
    16: (_decode(16, 64, 128, 4), _decode(16, 128, 64, 5)),
    32: (_decode(32, 64, 128, 4), _decode(32, 128, 64, 4)),
    64: (_decode(64, 128, 64, 4), _decode(64, 64, 64, 4)),
    128: (_decode(128, 128, 64, 3, 8), _decode(128, 128, 32, 4), _prefill(128, 128, 64, 3)),
    256: (_decode(128, 128, 64, 3, 8), _decode(128, 256, 32, 3, 8), _prefill(128, 128, 64, 3)),
}
# 99 KiB and less: fits every card that Triton supports.
_ANY: Candidates = {
    16: (_decode(16, 64, 128, 2),),
    32: (_decode(32, 64, 128, 2),),
    64: (_decode(64, 64, 128, 2),),
    128: (_decode(64, 64, 128, 2),),
    256: (_decode(64, 64, 128, 2),),
}

_HOPPER: Mapping[str, Candidates] = {
    "none": _HOPPER_16BIT,
    "fp8": _HOPPER_FP8_ROW,
    "fp8_block": _HOPPER_FP8_BLOCK,
    "int8": _HOPPER_WIDENED,
    "int4": _HOPPER_WIDENED,
}

# Found in the card's name, first match wins.
KNOWN_CARDS: Mapping[str, Mapping[str, Candidates]] = {
    "H100": _HOPPER,
    "H200": _HOPPER,
    "H800": _HOPPER,
    "H20": _HOPPER,
    "GH200": _HOPPER,
    "B200": _HOPPER,  # as much shared memory; compiles to tcgen05 without spills
    "A100": {"none": _AMPERE_16BIT},
    "A800": {"none": _AMPERE_16BIT},
}


def bucket_of(rows_per_expert: int) -> int:
    """The bucket of ROW_BUCKETS that holds `rows_per_expert`."""
    return next((bucket for bucket in ROW_BUCKETS if rows_per_expert <= bucket), ROW_BUCKETS[-1])


def candidates(card: str, scheme: str, bucket: int) -> tuple[TileConfig, ...]:
    """Tiles for a card (as the driver names it), its default first."""
    for name, schemes in KNOWN_CARDS.items():
        if name in card and scheme in schemes:
            return schemes[scheme][bucket]
    return _ANY[bucket]
