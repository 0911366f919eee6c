"""Scores against transformers' own model, and that a scheme that spoils the model would show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.bench import quality
from cluster.bench.emulated_backend import EmulatedBackend
from cluster.bench.held_out import held_out_texts
from experts.ops.backend import ExpertBackend
from experts.quant.int8 import Int8
from experts.quant.scheme import QuantisedWeight
from experts.spec import ExpertSpec

MODEL = Path(__file__).parents[3] / "deploy" / "demo-model"


def test_every_scheme_and_every_node_limit(capsys: pytest.CaptureFixture[str]) -> None:
    quality.command(as_json=True, model=MODEL, tokens=40, threads=1)
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    rows = {(row["device"], row["scheme"]): row for row in result["rows"]}
    assert list(rows) == [
        *[("cpu", scheme) for scheme in ("none", "fp16", "int8")],
        *[("gpu", scheme) for scheme in ("none", "fp8_block", "fp8", "int8", "int4")],
    ]
    for (device, scheme), row in rows.items():
        assert f"{device} {scheme}: text 1 of 1" in printed.err
        assert row["bits_per_byte"] == pytest.approx(result["summary"]["bits_per_byte"] + row["shift"])
        assert math.isfinite(row["shift"])
    assert rows["cpu", "none"]["relative_error"] < 1e-5
    assert abs(rows["cpu", "none"]["shift"]) < 1e-5
    assert 1e-4 < rows["cpu", "int8"]["relative_error"] < 0.03
    assert abs(rows["cpu", "int8"]["shift"]) < 0.02
    assert 1e-4 < rows["gpu", "none"]["relative_error"] < rows["gpu", "fp8"]["relative_error"]
    assert rows["gpu", "int8"]["relative_error"] < rows["gpu", "int4"]["relative_error"] < 0.1

    # The demo model's gate: 4 of 16 experts, out of 2 of 4 gate groups.
    limits = {(row["nodes"], row["max_nodes_per_token"]): row for row in result["node_limits"]}
    assert list(limits) == [(4, None), (4, 3), (4, 2), (4, 1), (8, None), (8, 3), (8, 2)]
    for (nodes, limit), row in limits.items():
        assert f"{nodes} nodes, {limit or 'all'} for a token: text 1 of 1" in printed.err
        assert 1 <= row["nodes_per_token"] <= (limit or nodes)
    # A gate group a node: the gate's own limit is 2.
    for limit in (None, 3, 2):
        assert limits[4, limit]["nodes_per_token"] <= 2
        assert limits[4, limit]["relative_error"] < 1e-5
    assert limits[8, None]["relative_error"] < 1e-5
    for lossy in (limits[4, 1], limits[8, 3], limits[8, 2]):
        assert lossy["relative_error"] > 1e-3
    assert limits[4, 1]["relative_error"] > limits[8, 3]["relative_error"]


@torch.inference_mode()
def test_bits_per_byte_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "backends", lambda spec, threads: {})
    monkeypatch.setattr(quality, "node_limits", lambda layout, gates: [])
    summary = quality.run(model=MODEL, tokens=64, threads=1)["summary"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor(tokenizer(held_out_texts()[0])["input_ids"][:65])
    nats = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")
    num_bytes = len(tokenizer.decode(ids[1:]).encode())
    assert (summary["tokens"], summary["bytes"]) == (64, num_bytes)
    assert summary["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) / num_bytes, rel=1e-5)


class Broken(Int8):
    """Forgets its scales."""

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        assert weight.scale is not None
        return super().dequantise(weight._replace(scale=torch.full_like(weight.scale, 0.01)), columns)


def test_a_broken_scheme_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: ExpertSpec, threads: int) -> Mapping[tuple[str, str], ExpertBackend]:
        return {("gpu", "int8"): EmulatedBackend(spec, Broken(), dtype=torch.bfloat16)}

    monkeypatch.setattr(quality, "backends", broken)
    monkeypatch.setattr(quality, "node_limits", lambda layout, gates: [])
    (row,) = quality.run(model=MODEL, tokens=40, threads=1)["rows"]
    assert row["relative_error"] > 0.1
    assert row["shift"] > 0.1


def test_a_model_whose_gate_stays_in_it_has_no_node_limits(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(quality, "backends", lambda spec, threads: {})
    assert quality.run(model=tiny_checkpoint("olmoe"), tokens=20, threads=1)["node_limits"] == []
