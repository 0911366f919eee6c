"""Scores against transformers' own model, and that a scheme that spoils the model would show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.bench import quality
from cluster.bench.emulated_backend import EmulatedBackend
from cluster.bench.held_out import held_out_texts
from cluster.serving.tokenizer import load_tokenizer
from experts.ops.backend import ExpertBackend
from experts.quant.int8 import Int8
from experts.quant.scheme import QuantisedWeight
from experts.spec import ExpertSpec

MODEL = Path(__file__).parents[3] / "deploy" / "demo-model"


def test_every_scheme_is_near_float32(capsys: pytest.CaptureFixture[str]) -> None:
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


@torch.inference_mode()
def test_bits_per_byte_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "backends", lambda spec, threads: {})
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
    (row,) = quality.run(model=MODEL, tokens=40, threads=1)["rows"]
    assert row["relative_error"] > 0.1
    assert row["shift"] > 0.1


def test_excerpts_cover_as_many_tokens_as_asked() -> None:
    excerpts = quality.excerpts_of(load_tokenizer(MODEL), tokens=250, context=100)
    assert [len(excerpt.ids_T) - 1 for excerpt in excerpts] == [100, 100, 50]
