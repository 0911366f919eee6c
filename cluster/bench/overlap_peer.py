"""The far end of the overlap benchmark: an expert group in a process of its own.

    python -m cluster.bench.overlap_peer CHECKPOINT GROUP GROUPS ADDRESS_FILE [LATENCY_MS US_PER_ROW]

serves group GROUP of GROUPS until it is stopped and writes its address to ADDRESS_FILE. With the last two, no experts:
answers come as late as from a device elsewhere.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import cast

import torch

from experts.group import ExpertGroup
from experts.ops.cpu_backend import CpuBackend
from experts.server import ExpertServer
from experts.spec import ExpertCall, ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.placement import balanced


class PacedGroup:
    """Answers with what it was sent, after a network's latency and a device's work, neither of which takes CPU time.

    ExpertServer takes the calls of a stream one by one, so that here a call's latency also holds up the next one: a
    real network is kinder to micro-batches.
    """

    def __init__(self, latency_ms: float, us_per_row: float) -> None:
        self._latency_s = latency_ms / 1e3
        self._s_per_row = us_per_row / 1e6

    def answer(self, request: bytes) -> None:
        """Every call is for `forward`."""

    def forward(self, call: ExpertCall) -> torch.Tensor:
        """See ExpertGroup.forward."""
        time.sleep(self._latency_s + self._s_per_row * len(call.token_rows_R))
        return call.hidden_TH.float()


def build_group(directory: Path, number: int, num_groups: int) -> ExpertGroup:
    """Group `number` with its share of the checkpoint's experts, on its share of this machine's cores."""
    checkpoint = Checkpoint(directory)
    layout = describe_experts(checkpoint, checkpoint.config())
    cores = max(1, len(os.sched_getaffinity(0)) // num_groups)
    group = ExpertGroup(number, layout.spec, CpuBackend(layout.spec, quantization="none", num_threads=cores))
    holders = balanced(layout.experts_per_layer, num_groups)
    keys = [ExpertKey(layer, e) for layer, held in holders.items() for e, by in enumerate(held) if number in by]
    group.assign(layout, checkpoint, keys)
    return group


def main(checkpoint: str, group: str, groups: str, address_file: str, *pace: str) -> None:
    """Serve until the process is stopped."""
    # As GroupHost does.
    sys.setswitchinterval(0.0002)
    torch.set_num_threads(1)
    if pace:
        latency_ms, us_per_row = map(float, pace)
        served: ExpertGroup | PacedGroup = PacedGroup(latency_ms, us_per_row)
    else:
        served = build_group(Path(checkpoint), int(group), int(groups))
    server = ExpertServer(cast(ExpertGroup, served))
    server.start()
    written = Path(address_file).with_suffix(".part")
    written.write_text(server.address)
    os.replace(written, address_file)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
