from __future__ import annotations

from pathlib import Path

import pytest

from cluster.planner.hardware import find_gpu, find_interconnect, gpu_presets, interconnect_presets
from experts.errors import ConfigError


def test_presets_are_complete() -> None:
    assert {"h100-80g", "h200", "a100-80g", "b200", "l40s", "mi300x"} <= set(gpu_presets())
    for gpu in gpu_presets().values():
        assert gpu.interconnect in interconnect_presets()
        assert gpu.bf16_flops > 1e14
        assert gpu.fp8_flops is None or gpu.fp8_flops > gpu.bf16_flops
    assert find_interconnect("ethernet-100g").bytes_per_s == 12.5e9


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {memory_gib: 24, memory_tb_per_s: 1.0, bf16_tflops: 165}")
    gpu = find_gpu(str(file))
    assert (gpu.name, gpu.memory_bytes, gpu.fp8_flops) == ("mine", 24 * 2**30, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: {memory_gib: 24}", "mine.memory_tb_per_s"),
        ("mine: {memory_gib: -1, memory_tb_per_s: 1, bf16_tflops: 1}", "mine.memory_gib"),
        ("mine: {memory_gib: 1, memory_tb_per_s: 1, bf16_tflops: 1, hbm: 3}", "mine.hbm"),
        ("memory_gib: 24", "memory_gib: expected a card's keys, as `mine: "),
        ("- mine", "the document: expected a card's keys"),
        ("{}", "describes 0 cards"),
        ("mine: [", "cannot be read as YAML"),
    ],
)
def test_a_bad_file_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_gpu(str(file))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean h100-80g"):
        find_gpu("h100")
    with pytest.raises(ConfigError, match="did you mean ethernet-100g"):
        find_interconnect("ethernet-10g")
