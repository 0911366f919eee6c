"""What tensors travel in between a router and the groups."""

from __future__ import annotations

from typing import Literal

import torch

WireDtype = Literal["model", "bf16", "fp8"]
"""What tensors travel in.

model  both ways as the model computes: nothing is lost with a float32 model; a 16-bit model's partial sums are rounded
       to it once per group, or once per node where a node's groups share a message
bf16   both ways: relative error up to 2^-8 on every value sent, 0.17 % in root mean square
fp8    hidden states as float8 e4m3 with one float32 scale per token and 128 columns (2.6 % in root mean square; values
       far below their block's largest become zero, see `experts.wire.frame.encode_frame`), partial sums as bf16
"""

_DTYPES: dict[WireDtype, tuple[torch.dtype | None, torch.dtype | None]] = {
    "model": (None, None),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}


def wire_dtypes(name: WireDtype) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Dtypes of hidden states and of partial sums; None: the hidden states' own."""
    return _DTYPES[name]
