from __future__ import annotations

import pytest
import torch

from cluster.planner.hardware import find_gpu
from cluster.planner.models import find_model
from cluster.planner.precision import SCHEMES, expert_bytes, expert_scheme
from experts.errors import ConfigError


def test_fp8_bytes_are_those_of_the_tensors_in_the_checkpoint() -> None:
    architecture = find_model("deepseek-v3").architecture
    # gate_proj, up_proj and down_proj with their weight_scale_inv, shapes as the release's index lists them.
    tensors = [torch.empty(2048, 7168, dtype=torch.float8_e4m3fn, device="meta") for _ in range(2)]
    tensors += [torch.empty(7168, 2048, dtype=torch.float8_e4m3fn, device="meta")]
    tensors += [torch.empty(16, 56, device="meta"), torch.empty(16, 56, device="meta")]
    tensors += [torch.empty(56, 16, device="meta")]
    assert expert_bytes(architecture, SCHEMES["fp8"]) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("scheme", "bytes_a_weight"), [("bf16", 2), ("fp16", 2), ("float32", 4), ("int8", 1), ("int4", 0.5)]
)
def test_bytes_follow_the_width(scheme: str, bytes_a_weight: float) -> None:
    architecture = find_model("mixtral-8x7b").architecture
    weights = 3 * 4096 * 14336
    assert expert_bytes(architecture, SCHEMES[scheme]) == pytest.approx(weights * bytes_a_weight, rel=0.07)
    assert expert_bytes(architecture, SCHEMES[scheme]) >= weights * bytes_a_weight


def test_an_fp8_checkpoint_is_widened_on_a_card_without_fp8() -> None:
    deepseek = find_model("deepseek-v3").architecture
    assert expert_scheme(deepseek, "none", find_gpu("h100-80g")).name == "fp8"
    assert expert_scheme(deepseek, "none", find_gpu("a100-80g")).name == "bf16"
    assert expert_scheme(deepseek, "int4", find_gpu("a100-80g")).name == "int4"
    assert expert_scheme(find_model("gshard-600b").architecture, "none", find_gpu("h100-80g")).name == "float32"


def test_what_a_card_or_the_system_cannot_hold_is_refused() -> None:
    deepseek = find_model("deepseek-v3").architecture
    with pytest.raises(ConfigError, match="a100-80g has no fp8 units"):
        expert_scheme(deepseek, "fp8", find_gpu("a100-80g"))
    with pytest.raises(ConfigError, match="use one of none, fp8"):
        expert_scheme(deepseek, "int3", find_gpu("h200"))
