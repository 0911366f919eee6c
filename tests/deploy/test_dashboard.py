"""The dashboard asks only for metrics that we export, under the names that a scrape shows."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.expert_metrics import ExpertMetrics
from cluster.observe.request_metrics import RequestMetrics
from cluster.serving.engine import StepTimes
from router_service.counters import RouterCounters
from router_service.gating.capacity import CapacityGate
from router_service.gating.gate import GateOutput
from router_service.placement import GroupReplica, PlacementTable

DASHBOARD = Path(__file__).parents[2] / "deploy" / "components" / "monitoring" / "dashboard.json"
FUNCTIONS = {"sum", "max", "avg", "count", "rate", "by", "or", "vector", "topk", "histogram_quantile", "label_values"}


def no_gate(*_: object) -> GateOutput:
    raise AssertionError("nothing is gated here")


@pytest.fixture
def exported() -> dict[str, set[str]]:
    """Label names of every metric in a scrape after some traffic."""
    registry = CollectorRegistry()
    stats = SimpleNamespace(running=1, waiting=0, kv_cache_usage=0.5, times=StepTimes())
    RequestMetrics(registry, model_name="m", stats=lambda: stats).finished("stop", 1.0)
    replica = GroupReplica(group=0, replica="r", node="n", address="a")
    table = PlacementTable(version=1, num_groups=1, holders={0: ((0,),)}, replicas=(replica,))
    counters = RouterCounters()
    counters.batch(0, 1, np.array([1]))
    registry.register(
        ExpertMetrics(
            model_name="m",
            transport="grpc",
            counters=counters,
            table=lambda: table,
            capacity_gates=[CapacityGate(no_gate, 1, 1.0, "drop")],
        )
    )
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_every_query_is_about_a_metric_and_labels_of_ours(exported):
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(queries) > 10
    for query in queries:
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)", "", query)
        metrics = set(re.findall(r"[a-z_:]{3,}[a-z]", bare)) - FUNCTIONS - {"model_name"}
        assert metrics, query
        assert metrics <= set(exported), query
        labels = {label.strip() for listed in re.findall(r"by \(([^)]*)\)", query) for label in listed.split(",")}
        assert all(labels <= exported[metric] for metric in metrics), query
    assert any("vllm:time_to_first_token_seconds_bucket" in query for query in queries)
    assert any("expert_dispatch_latency_seconds_bucket" in query for query in queries)


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(p["x"] + p["w"] <= 24 for p in places)
