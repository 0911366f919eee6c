"""What the kernels are compared with: torch's grouped_mm, a dense matmul of the same FLOPs, a device copy."""

from __future__ import annotations

import torch
from gpu_cases import Call, Case, Clock

grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def time_grouped_mm(case: Case, call: Call, clock: Clock) -> dict[str, float]:
    """ms of torch's grouped matmul for both projections, on rows that are sorted already and without activation."""
    assert grouped_mm is not None, "this torch has no grouped_mm"
    times = {}
    for name, weights in (("up", [w.up_2IH for w in case.distinct]), ("down", [w.down_HI for w in case.distinct])):
        stacked = torch.stack([weights[slot % len(weights)] for slot in call.slots_S.tolist()])
        x = torch.randn(call.token_rows_R.numel(), stacked.shape[2], device=case.device).to(case.dtype)
        ends = call.offsets_S1[1:].contiguous()
        times[name] = clock(lambda x=x, w=stacked, ends=ends: grouped_mm(x, w.transpose(1, 2), offs=ends))
    return times


def time_dense(case: Case, call: Call, clock: Clock) -> dict[str, float]:
    """ms of one dense matmul with as many rows, through cuBLAS."""
    times = {}
    for name, weight in (("up", case.distinct[0].up_2IH), ("down", case.distinct[0].down_HI)):
        x = torch.randn(call.token_rows_R.numel(), weight.shape[1], device=case.device).to(case.dtype)
        times[name] = clock(lambda x=x, w=weight: torch.nn.functional.linear(x, w))
    return times


def copy_gb_s(device: torch.device, clock: Clock, *, nbytes: int) -> float:
    """GB/s of a device-to-device copy, read and written bytes both counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock(lambda: target.copy_(source)) / 1e6


def square_tflops(device: torch.device, clock: Clock, *, size: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matmul through cuBLAS: what the card reaches, rather than its data sheet."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / clock(lambda: a @ b) / 1e9
