from cluster.bench.dispatch_copies import copies_rows


def test_each_step_sends_less():
    rows = copies_rows()
    assert [(row["pattern"], row["nodes"]) for row in rows] == [
        (pattern, nodes) for pattern in ("deepseek-v3", "mixtral") for nodes in (2, 4, 8)
    ]
    for row in rows:
        assert row["per_expert"] >= row["per_group"] >= row["per_node"] >= row["exact_with_redundant_experts"] >= 1
        assert row["restrict"] <= row["per_node"]
        # DeepSeek-V3's own limit: 4 of 8 gate groups.
        assert row["per_node"] <= min(row["nodes"], 4 if row["pattern"] == "deepseek-v3" else 2)
