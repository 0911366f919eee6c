"""What a scrape shows of a router."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.expert_metrics import ExpertMetrics
from router_service.counters import RouterCounters
from router_service.gating.capacity import CapacityGate
from router_service.gating.gate import GateOutput
from router_service.placement import GroupReplica, PlacementTable

TABLE = PlacementTable(
    version=3,
    num_groups=3,
    holders={0: ((0,), (1,), (2,))},
    replicas=tuple(
        GroupReplica(group=group, replica=f"r{index}", node="n", address="a") for index, group in enumerate((0, 0, 2))
    ),
)


def choose_first(hidden_TH: torch.Tensor, limit: object = None) -> GateOutput:
    """A gate that sends every token to expert 0."""
    return GateOutput(torch.zeros(len(hidden_TH), 1, dtype=torch.int64), torch.ones(len(hidden_TH), 1))


class Scraped:
    """A router's counters behind /metrics. Samples are keyed by name and label values, in the order of label names."""

    def __init__(self, table: PlacementTable | None = TABLE, **options: object) -> None:
        self.counters = RouterCounters()
        self.now = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(
            ExpertMetrics(
                model_name="m",
                transport="grpc",
                counters=self.counters,
                table=lambda: table,
                clock=lambda: self.now,
                **options,
            )
        )
        self.scrape()

    def tokens(self, *tokens_E: int) -> None:
        self.counters.batch(0, sum(tokens_E), np.array(tokens_E))

    def scrape(self) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(generate_latest(self._registry).decode())
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.labels.pop("model_name") == "m" for sample in samples)
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples
        }


def test_counters() -> None:
    router = Scraped()
    router.tokens(3, 0, 5)
    router.counters.call(8, 6, 640, remote=True)
    router.counters.call(4, 3, 320, remote=False)
    router.counters.node(6)
    router.counters.node(6)
    router.counters.received(1280)
    router.counters.failovers = 2
    router.counters.degraded_tokens = 1
    shown = router.scrape()
    assert shown["dispatch_bytes_total", "remote", "grpc"] == 640
    assert shown["dispatch_bytes_total", "node", "grpc"] == 320
    assert shown["combine_bytes_total", "grpc"] == 1280
    assert shown["dispatch_nodes_per_token",] == 1.5
    assert shown["dispatch_tokens_total",] == 8
    assert shown["dispatch_token_copies_total",] == 9
    assert shown["expert_failovers_total",] == 2
    assert shown["expert_degraded_tokens_total",] == 1
    assert [shown["expert_tokens_total", str(expert), "0"] for expert in range(3)] == [3, 0, 5]


def test_dispatch_latency_is_a_histogram_of_seconds() -> None:
    router = Scraped()
    for seconds in (0.00005, 0.004, 0.005, 0.2, 300):
        router.counters.combined(seconds)
    shown = router.scrape()
    name = "expert_dispatch_latency_seconds"
    buckets = {bound: shown[f"{name}_bucket", bound] for bound in ("0.0001", "0.0025", "0.005", "0.1", "60.0", "+Inf")}
    assert buckets == {"0.0001": 1, "0.0025": 1, "0.005": 3, "0.1": 3, "60.0": 4, "+Inf": 5}
    assert shown[f"{name}_count",] == 5
    assert shown[f"{name}_sum",] == pytest.approx(300.20905)


def test_overflow_of_capacity_shows_where_there_is_a_capacity() -> None:
    gates = [CapacityGate(choose_first, 4, 1.0, "drop") for _ in range(2)]
    for gate in gates:
        gate(torch.zeros(8, 2))
    shown = Scraped(capacity_gates=gates).scrape()
    assert shown["expert_capacity_overflow_total", "dropped"] == 2 * (8 - 2)
    assert shown["expert_capacity_overflow_total", "rerouted"] == 0
    assert not any(name.startswith("expert_capacity") for name, *_ in Scraped().scrape())


def test_groups() -> None:
    shown = Scraped().scrape()
    assert [shown["expert_group_alive", str(group)] for group in range(3)] == [1, 0, 1]
    assert [shown["expert_replicas", str(group)] for group in range(3)] == [2, 0, 1]


def test_no_table_yet() -> None:
    assert not any(name.startswith(("expert_group", "eplb")) for name, *_ in Scraped(table=None).scrape())


def test_only_the_busiest_experts_unless_all_are_asked_for() -> None:
    few, every = Scraped(max_experts=2), Scraped(max_experts=None)
    for router in (few, every):
        router.tokens(3, 9, 5)
    assert {key[1] for key in few.scrape() if key[0] == "expert_tokens_total"} == {"1", "2"}
    assert {key[1] for key in every.scrape() if key[0] == "expert_tokens_total"} == {"0", "1", "2"}


def test_balancedness_forgets_what_is_long_past() -> None:
    router = Scraped()
    router.tokens(900, 0, 0)
    assert router.scrape()["eplb_balancedness_ratio",] == pytest.approx(1 / 3)
    for router.now in range(10, 80, 10):
        router.tokens(10, 10, 10)
        ratio = router.scrape()["eplb_balancedness_ratio",]
    assert ratio == 1.0
    router.now = 200
    router.scrape()
    router.now = 300
    assert ("eplb_balancedness_ratio",) not in router.scrape()
