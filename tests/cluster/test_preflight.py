"""Settings that are valid by themselves and cannot be served: each is found, named by its key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.load import parse_mesh
from cluster.preflight import setting_problems

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what is refused here")


def problems(checkpoint: Path, here: bool, sections: dict[str, Any]) -> list[str]:
    model = {"source": str(checkpoint)} | sections.pop("model", {})
    return setting_problems(parse_mesh({"model": model, **sections}, origin="test"), here=here)


def test_nothing_is_wrong(tiny_checkpoint: Callable[[str], Path]) -> None:
    assert problems(tiny_checkpoint("mixtral"), True, {"engine": {"max_model_len": 2048}}) == []


@needs_no_gpu
@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"http": {"api_keys_file": "/nonexistent/keys"}}, "http.api_keys_file: /nonexistent/keys"),
        ({"engine": {"max_model_len": 100_000_000}}, "engine.max_model_len is 100000000"),
        ({"model": {"quantization": "fp8"}}, "model.quantization: 'fp8' needs a GPU"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype: bfloat16"),
        ({"engine": {"device": "cuda"}}, "engine.device: cuda"),
        ({"experts": {"device": "cuda"}}, "experts.device: cuda"),
        ({"engine": {"replicas": 2}, "router": {"service_port": 9000}}, "router.service_port: only one engine"),
        ({"autoscaling": {"experts": {"foo": 1}}}, "autoscaling.experts: unknown key 'foo'"),
    ],
)
def test_one_thing_is_wrong(tiny_checkpoint: Callable[[str], Path], sections: dict[str, Any], words: str) -> None:
    (problem,) = problems(tiny_checkpoint("mixtral"), True, sections)
    assert words in problem


def test_what_another_machine_decides_is_left_to_it(tiny_checkpoint: Callable[[str], Path]) -> None:
    elsewhere = {"model": {"quantization": "fp8", "dtype": "bfloat16"}, "http": {"api_keys_file": "/nonexistent"}}
    assert problems(tiny_checkpoint("mixtral"), False, elsewhere) == []


def test_of_a_missing_checkpoint_others_tell(tmp_path: Path) -> None:
    assert problems(tmp_path / "nowhere", True, {"engine": {"max_model_len": 10}}) == []
