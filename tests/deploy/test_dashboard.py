"""The dashboard asks only for metrics that we export, under the names that a scrape shows."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.expert_metrics import ExpertMetrics
from cluster.observe.request_metrics import RequestMetrics
from router_service.counters import RouterCounters
from router_service.placement import GroupReplica, PlacementTable

DASHBOARD = Path(__file__).parents[2] / "deploy" / "components" / "monitoring" / "dashboard.json"
FUNCTIONS = {"sum", "max", "avg", "count", "rate", "by", "or", "vector", "topk", "histogram_quantile", "label_values"}


@pytest.fixture
def exported() -> dict[str, set[str]]:
    """Label names of every metric in a scrape."""
    registry = CollectorRegistry()
    stats = SimpleNamespace(running=1, waiting=0, kv_cache_usage=0.5)
    RequestMetrics(registry, model_name="m", stats=lambda: stats)
    replica = GroupReplica(group=0, replica="r", node="n", address="a")
    table = PlacementTable(version=1, num_groups=1, holders={0: ((0,),)}, replicas=(replica,))
    counters = RouterCounters()
    registry.register(
        ExpertMetrics(model_name="m", transport="grpc", counters=counters, table=lambda: table, max_experts=None)
    )
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    names = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    # Series that come with the first token or the first rebalance are not there yet; their names are.
    return (
        names
        | {family.name + "_total": set() for family in families if family.type == "counter"}
        | {family.name: set() for family in families if family.name not in names}
    )


def test_every_query_is_about_a_metric_of_ours(exported):
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(queries) > 10
    asked = set()
    for query in queries:
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)", "", query)
        asked |= set(re.findall(r"[a-z_:]{3,}[a-z]", bare)) - FUNCTIONS
    assert asked - {"model_name"} <= set(exported) | {"eplb_balancedness_ratio"}
    assert "vllm:time_to_first_token_seconds_bucket" in asked


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(p["x"] + p["w"] <= 24 for p in places)
