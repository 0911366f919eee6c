"""What a router has done, as plain numbers that an exporter may read at any time."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# From a group in the same process to one that is being loaded again.
LATENCY_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class RouterCounters:
    """Only ever grow. Written under one lock; a reader may see a call half counted.

    batches, tokens:   route and dispatch calls, and tokens in them
    calls, rows:       calls to groups, and routed rows in them
    token_nodes:       nodes that tokens' experts were on, summed over tokens
    token_copies:      hidden states sent: one per token and group, or per token and node that shares a message
    bytes_sent:        of hidden states, before any wire dtype; bytes_sent_remote: those to another node
    bytes_received:    of partial sums, as float32
    failovers:         parts that another replica or a later table had to answer
    degraded_tokens:   tokens that lost at least one expert's contribution (`on_expert_loss: degrade`)
    expert_tokens:     layer -> int64 [E], tokens that chose each expert
    latency_counts:    combined batches by the time from dispatch to sum: at most LATENCY_S[i] seconds and more than
                       the bound before it, and last those beyond all bounds; latency_s: those times, summed
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.batches = 0
        self.tokens = 0
        self.calls = 0
        self.rows = 0
        self.token_nodes = 0
        self.token_copies = 0
        self.bytes_sent = 0
        self.bytes_sent_remote = 0
        self.bytes_received = 0
        self.failovers = 0
        self.degraded_tokens = 0
        self.expert_tokens: dict[int, npt.NDArray[np.int64]] = {}
        self.latency_counts = [0] * (len(LATENCY_S) + 1)
        self.latency_s = 0.0

    def batch(self, layer: int, num_tokens: int, tokens_per_expert_E: npt.NDArray[np.int64]) -> None:
        """Count a batch that was planned."""
        with self.lock:
            self._batch(layer, num_tokens, tokens_per_expert_E)

    def small_batches(
        self,
        layers: Sequence[int],
        tokens_per_expert_LE: npt.NDArray[np.int64],
        shares_LG3: npt.NDArray[np.int64],
        num_tokens: int,
        hidden_size: int,
        seconds_L: Sequence[float],
    ) -> None:
        """Count batches that went to groups of this node, one a layer, and came back after so long: all that is counted
        of each, at once. Beyond `layers`, arrays are not looked at.

        shares_LG3: see `SplitRows`
        """
        rows_LG, _, tokens_LG = shares_LG3[: len(layers)].transpose(2, 0, 1)
        copies_LG = np.where(tokens_LG > 0, tokens_LG, num_tokens) * (rows_LG > 0)
        calls, rows, copies = int(np.count_nonzero(rows_LG)), int(rows_LG.sum()), int(copies_LG.sum())
        with self.lock:
            for layer, tokens_per_expert_E, seconds in zip(layers, tokens_per_expert_LE, seconds_L, strict=False):
                self._batch(layer, num_tokens, tokens_per_expert_E)
                self._combined(seconds)
            self.token_nodes += num_tokens * len(layers)
            self.calls += calls
            self.rows += rows
            self.token_copies += copies
            self.bytes_sent += copies * hidden_size * 4
            self.bytes_received += copies * hidden_size * 4

    def node(self, num_tokens: int) -> None:
        """Count the tokens of a batch that go to one node."""
        with self.lock:
            self.token_nodes += num_tokens

    def call(self, num_rows: int, num_tokens: int, num_bytes: int, *, remote: bool) -> None:
        """Count a message that was sent to a group, or to the groups of a node."""
        with self.lock:
            self.calls += 1
            self.rows += num_rows
            self.token_copies += num_tokens
            self.bytes_sent += num_bytes
            if remote:
                self.bytes_sent_remote += num_bytes

    def received(self, num_bytes: int) -> None:
        """Count an answer."""
        with self.lock:
            self.bytes_received += num_bytes

    def combined(self, seconds: float) -> None:
        """Count a batch whose sum is there, and how long after its dispatch."""
        with self.lock:
            self._combined(seconds)

    def _batch(self, layer: int, num_tokens: int, tokens_per_expert_E: npt.NDArray[np.int64]) -> None:
        self.batches += 1
        self.tokens += num_tokens
        counted = self.expert_tokens.get(layer)
        if counted is None:
            self.expert_tokens[layer] = tokens_per_expert_E.copy()
        else:
            counted += tokens_per_expert_E

    def _combined(self, seconds: float) -> None:
        self.latency_counts[bisect_left(LATENCY_S, seconds)] += 1
        self.latency_s += seconds
