"""Metrics of experts, groups and dispatch, read from a router when Prometheus asks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from cluster.observe.balancedness import balancedness
from router_service.counters import LATENCY_S, RouterCounters
from router_service.gating.capacity import CapacityGate
from router_service.placement import PlacementTable

_WINDOW_S = 60.0

ExpertTokens = Mapping[int, npt.NDArray[np.int64]]


class ExpertMetrics:
    """A Prometheus collector over one router.

    table:       the router's placement table now, None before the first
    capacity_gates: those of the router's gates that limit experts; empty where `router.capacity_factor` is null
    max_experts: series of `expert_tokens_total`, the busiest experts first; None for all of them, which for large
                 models is tens of thousands
    """

    def __init__(
        self,
        *,
        model_name: str,
        transport: str,
        counters: RouterCounters,
        table: Callable[[], PlacementTable | None],
        capacity_gates: Collection[CapacityGate] = (),
        max_experts: int | None = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model_name = model_name
        self._transport = transport
        self._counters = counters
        self._table = table
        self._capacity_gates = capacity_gates
        self._max_experts = max_experts
        self._clock = clock
        self._history: deque[tuple[float, ExpertTokens]] = deque()

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        with counters.lock:
            expert_tokens = {layer: tokens_E.copy() for layer, tokens_E in counters.expert_tokens.items()}
            sent, sent_remote, received = counters.bytes_sent, counters.bytes_sent_remote, counters.bytes_received
            tokens, nodes, copies = counters.tokens, counters.token_nodes, counters.token_copies
            failovers, degraded = counters.failovers, counters.degraded_tokens
            latency_counts, latency_s = tuple(counters.latency_counts), counters.latency_s
        yield self._counter("dispatch_tokens", "Tokens dispatched, once a layer.", {(): tokens})
        yield self._counter("dispatch_token_copies", "Hidden states sent to groups or nodes.", {(): copies})
        nearby = "local" if self._transport == "in_process" else "node"
        yield self._counter(
            "dispatch_bytes",
            "Bytes of hidden states sent: within the process (local), to the same node, to a remote one.",
            {(self._transport, nearby): sent - sent_remote, (self._transport, "remote"): sent_remote},
            labels=("transport", "scope"),
        )
        yield self._counter(
            "combine_bytes", "Bytes of partial sums received.", {(self._transport,): received}, ("transport",)
        )
        if tokens:
            about = "Nodes that a token's experts of a layer are on, mean since the start."
            yield self._gauge("dispatch_nodes_per_token", about, {(): nodes / tokens})
        yield self._latency(latency_counts, latency_s)
        yield self._counter("expert_failovers", "Parts of a batch answered by another replica.", {(): failovers})
        yield self._counter("expert_degraded_tokens", "Tokens that lost an expert's share.", {(): degraded})
        if self._capacity_gates:
            dropped = sum(gate.dropped for gate in self._capacity_gates)
            rerouted = sum(gate.rerouted for gate in self._capacity_gates)
            about = "Choices beyond an expert's capacity, by what became of them."
            yield self._counter(
                "expert_capacity_overflow", about, {("dropped",): dropped, ("rerouted",): rerouted}, ("outcome",)
            )
        yield self._expert_tokens(expert_tokens)
        table = self._table()
        if table is not None:
            yield from self._groups(table)
            ratio = balancedness(self._recent(expert_tokens), table)
            if ratio is not None:
                about = f"Mean over layers of mean by largest load of groups, last {_WINDOW_S:g} s."
                yield self._gauge("eplb_balancedness_ratio", about, {(): ratio})

    def _latency(self, counts: tuple[int, ...], seconds: float) -> Metric:
        family = HistogramMetricFamily(
            "expert_dispatch_latency_seconds",
            "From a layer's dispatch to its experts' combined sum, failovers included.",
            labels=("model_name",),
        )
        bounds = (*map(str, LATENCY_S), "+Inf")
        family.add_metric((self._model_name,), list(zip(bounds, accumulate(counts), strict=True)), seconds)
        return family

    def _groups(self, table: PlacementTable) -> Iterator[Metric]:
        replicas: dict[tuple[str, ...], float] = {(str(group),): 0 for group in range(table.num_groups)}
        for replica in table.replicas:
            replicas[str(replica.group),] += 1
        alive = {group: min(1.0, count) for group, count in replicas.items()}
        yield self._gauge("expert_group_alive", "1 where the group has a live replica.", alive, labels=("group",))
        yield self._gauge("expert_replicas", "Live replicas of the group.", replicas, labels=("group",))

    def _expert_tokens(self, expert_tokens: ExpertTokens) -> Metric:
        counts = {
            (str(layer), str(expert)): count
            for layer, tokens_E in expert_tokens.items()
            for expert, count in enumerate(tokens_E.tolist())
        }
        busiest = sorted(counts.items(), key=lambda item: -item[1])[: self._max_experts]
        return self._counter(
            "expert_tokens", "Tokens that chose the expert.", dict(busiest), labels=("layer", "expert")
        )

    def _recent(self, now: ExpertTokens) -> ExpertTokens:
        """Tokens since the newest scrape that is at least a window ago, else since the first."""
        at = self._clock()
        while len(self._history) > 1 and self._history[1][0] <= at - _WINDOW_S:
            self._history.popleft()
        self._history.append((at, now))
        before = self._history[0][1] if len(self._history) > 1 else {}
        return {layer: tokens_E - before.get(layer, 0) for layer, tokens_E in now.items()}

    def _counter(
        self, name: str, about: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
    ) -> Metric:
        return self._fill(CounterMetricFamily(name, about, labels=("model_name", *labels)), values)

    def _gauge(
        self, name: str, about: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
    ) -> Metric:
        return self._fill(GaugeMetricFamily(name, about, labels=("model_name", *labels)), values)

    def _fill(self, family: Metric, values: Mapping[tuple[str, ...], float]) -> Metric:
        for labels, value in values.items():
            family.add_metric((self._model_name, *labels), value)
        return family
