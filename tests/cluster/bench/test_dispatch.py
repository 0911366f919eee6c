import pytest
import torch

from cluster.bench.dispatch import run
from cluster.bench.dispatch_case import DispatchBench
from experts.errors import ConfigError


def test_rows_and_summary_hold_what_they_promise():
    threads = torch.get_num_threads()
    bench = DispatchBench(
        tokens=(1, 3), groups=(2,), transports=("grpc",), num_experts=16, top_k=2, hidden_size=64, seconds=0.01
    )
    result = run(bench)
    assert torch.get_num_threads() == threads
    alone = [row for row in result["rows"] if row["what"] == "gate_plan_combine"]
    sent = [row for row in result["rows"] if row["what"] == "dispatch_combine"]
    assert [(row["tokens"], row["groups"]) for row in alone] == [(1, 2), (3, 2)]
    assert [(row["transport"], row["tokens"], row["peers"]) for row in sent] == [("grpc", 1, 2), ("grpc", 3, 2)]
    for row in alone:
        assert row["total_us"] == pytest.approx(row["gate_us"] + row["plan_us"] + row["combine_us"], abs=0.2)
    for row in sent:
        assert row["ratio_to_echo"] == pytest.approx(row["p50_us"] / row["echo_p50_us"], rel=0.01)
        without, sharing = row["without_shared_memory_us"], row["with_shared_memory_us"]
        assert row["without_shared_memory_ratio"] == pytest.approx(without / sharing, rel=0.01)
    # A token's two experts are on one or two of the peers.
    assert 64 * 4 <= sent[0]["bytes_each_way"] < 2 * 64 * 4 + 300
    assert result["summary"]["max_ratio_to_echo"] == max(row["ratio_to_echo"] for row in sent)
    ratios = {str(row["tokens"]): row["without_shared_memory_ratio"] for row in sent}
    assert result["summary"]["without_shared_memory_ratio"] == ratios
    assert set(result["summary"]["gate_plan_combine_us_per_token"]) == {"1", "3"}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"peers": 0}, "--peers"), ({"transports": ("udp",)}, "udp"), ({"num_experts": 12}, "--num-experts")],
)
def test_impossible_settings_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        DispatchBench(**change)
