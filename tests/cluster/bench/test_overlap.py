from __future__ import annotations

import pytest

from cluster.bench.overlap import OverlapBench, run, summarise
from experts.errors import ConfigError


def test_both_sides_of_real_and_paced_experts_agree() -> None:
    bench = OverlapBench(decode=(3,), prefill=(160,), latency_ms=0.5, us_per_row=1.0, seconds=0.0)
    result = run(bench)
    assert [(row["experts"], row["step"], row["tokens"]) for row in result["rows"]] == [
        (experts, step, tokens)
        for experts in ("here", "elsewhere")
        for step, tokens in (("decode", 3), ("prefill", 160))
    ]
    for row in result["rows"]:
        assert row["same_tokens"]
        assert row["logits_differ"] < 1e-3
        assert row["speedup"] == pytest.approx(row["off_ms"] / row["on_ms"], rel=0.01)
        assert 0 < row["waiting_on"] < 1
        assert 0 < row["waiting_off"] < 1
    assert set(result["summary"]) == {"here", "elsewhere"}


def test_pays_from_the_first_of_a_row_of_wins() -> None:
    speedups = {2: 1.1, 8: 0.7, 32: 1.01, 128: 1.3}
    rows = [
        {"experts": "elsewhere", "step": "decode", "tokens": tokens, "speedup": speedup}
        for tokens, speedup in speedups.items()
    ]
    rows.append({"experts": "here", "step": "decode", "tokens": 2, "speedup": 0.9})
    assert summarise(rows) == {"elsewhere": {"decode": 32}, "here": {"decode": None}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"groups": 0}, "--groups"),
        ({"decode": (1,)}, "--decode"),
        ({"experts": ("mars",)}, "mars"),
        ({"latency_ms": -1.0}, "--latency-ms"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        OverlapBench(**change)  # type: ignore[arg-type]
