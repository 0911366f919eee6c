"""The sum of the answers that groups of this machine owe, read and added by compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from experts.wire.client import Reply, StreamReply

# What takes longer is left to those who know how long they may wait.
_PATIENCE_S = 1.0
# What surrounds the numbers of a message is shorter.
_FRAME_BYTES = 128
_ALL = -1


def sum_answers(
    replies: Sequence[Reply], tokens: Sequence[npt.NDArray[np.int32] | None], timeout_s: float, out_TH: torch.Tensor
) -> int:
    """Add the first answers, one after the other, to `out_TH` (float32 zeros, on the CPU); how many they are.

    It ends before the first that is not an ordinary answer over a stream that nobody else reads, or not here in time:
    `Reply.result` of that one says more. Answers in the sum have no `result` any more.

    tokens: int32, the tokens of the batch that each answer's rows are for, distinct and ascending; None: all
    """
    streams: list[tuple[StreamReply, int]] = []
    done, rest = 0, b""
    try:
        for reply in replies:
            if not isinstance(reply, StreamReply) or (socket := reply.claim()) < 0:
                break
            streams.append((reply, socket))
        if streams:
            received = np.empty(out_TH.nbytes + _FRAME_BYTES, np.uint8)
            chosen = [each for each in tokens[: len(streams)] if each is not None]
            done, have = compiled_add_answers()(
                np.array([socket for _, socket in streams]),
                np.array([reply.call_id for reply, _ in streams]),
                np.array([_ALL if each is None else len(each) for each in tokens[: len(streams)]]),
                np.concatenate(chosen) if chosen else np.empty(0, np.int32),
                int(1e3 * min(timeout_s, _PATIENCE_S)),
                received,
                np.empty(out_TH.numel(), np.float32),
                out_TH.numpy(),
            )
            rest = received[:have].tobytes()
    finally:
        for index, (reply, _) in enumerate(streams):
            reply.release(answered=index < done, rest=rest if index == done else b"")
    return done


@cache
def compiled_add_answers() -> Callable[..., tuple[int, int]]:
    """What reads and adds them; the first call compiles it."""
    # Loads LLVM, which whoever only answers does not need.
    from experts.wire._numba.add_answers import compile_add_answers

    return compile_add_answers()
