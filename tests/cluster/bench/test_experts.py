"""The benchmark's arithmetic, and that it runs whole on small shapes."""

from __future__ import annotations

import json
import math

import pytest

from cluster.bench import experts as bench

TINY = {"Mix": bench.Shape(num_experts=4, hidden_size=64, intermediate_size=48, top_k=2)}


def test_runs_whole() -> None:
    result = bench.run(shapes=TINY, tokens=(1, 8, 512), threads=1, seconds=0.0)
    assert set(result) == {"rows", "summary"}
    assert set(result["summary"]) == {
        "geomean_vs_transformers",
        "min_vs_transformers",
        "int8_geomean_vs_transformers",
        "mm_fraction_t512",
        "read_fraction_t1",
    }
    for row in result["rows"]:
        assert set(row) == {"shape", "tokens", "variant", "ms", "relative_error"}
        assert row["ms"] > 0
    errors = {
        variant: max(row["relative_error"] for row in result["rows"] if row["variant"] == variant)
        for variant in (*bench.OURS, *bench.TRANSFORMERS)
    }
    assert errors["lossless"] < 1e-6
    assert errors["float32"] < 1e-6
    assert 1e-4 < errors["int8"] < 5e-2
    assert all(errors[variant] < 1e-6 for variant in bench.TRANSFORMERS)
    json.dumps(result)


def test_the_summary_compares_with_the_fastest_of_transformers() -> None:
    times = {
        ("Mix", 1): {"eager": 8.0, "grouped_mm": 4.0, "lossless": 2.0, "int8": 1.0, "memory": 1.0},
        ("Mix", 512): {"eager": 9.0, "grouped_mm": 10.0, "lossless": 10.0, "int8": 2.0, "torch.mm": 7.0},
    }
    rows = [
        {"shape": shape, "tokens": tokens, "variant": variant, "ms": ms, "relative_error": 0.0}
        for (shape, tokens), variants in times.items()
        for variant, ms in variants.items()
    ]
    summary = bench.summarise(rows)
    assert summary["geomean_vs_transformers"] == pytest.approx(math.sqrt(2.0 * 0.9))
    assert summary["min_vs_transformers"] == pytest.approx(0.9)
    assert summary["int8_geomean_vs_transformers"] == pytest.approx(math.sqrt(4.0 * 4.5))
    assert summary["mm_fraction_t512"] == {"Mix": pytest.approx(0.7)}
    assert summary["read_fraction_t1"] == {"Mix": pytest.approx(0.5)}
