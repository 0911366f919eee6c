"""A compiled MLP against the families' own, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from cluster.serving.compiled_mlp import CompiledMlp, compile_mlps
from cluster.serving.packed_linear import pack_linears
from experts.ops import packed_matmul
from experts.ops.cpu_threads import ThreadTeam

# The result's last panel is not whole.
HIDDEN, INNER = 72, 96
_FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3MoeMLP, Qwen3MoeConfig),
    "deepseek-v2": (DeepseekV2MLP, DeepseekV2Config),
    "deepseek-v3": (DeepseekV3MLP, DeepseekV3Config),
}


def family_mlp(family: str, **options: Any) -> nn.Module:
    module, config = _FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4}
    mlp: nn.Module = module(config(**{**sizes, **options}))
    return mlp.requires_grad_(False)


def compiled(mlp: nn.Module, num_threads: int = 1) -> nn.Module:
    """What becomes of a model's MLP."""
    model, team = nn.ModuleList([mlp]), ThreadTeam(num_threads)
    pack_linears(model, team)
    compile_mlps(model, team)
    return model[0]


def count_calls(mlp: Any) -> list[int]:
    """The rows of every call of the family's own module, as they come."""
    rows: list[int] = []
    mlp.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[-2]))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(_FAMILIES))
def test_rows_are_those_of_the_familys_own(family: str, dtype: torch.dtype) -> None:
    mlp = family_mlp(family).to(dtype).float()  # bfloat16 numbers are packed in half the bytes
    batches = [torch.randn(1, num_rows, HIDDEN) * 3 for num_rows in (0, 1, 5, 64, 65)]
    expected = [mlp.double()(hidden.double()) for hidden in batches]
    calls = count_calls(mlp)
    ours = compiled(mlp.float())
    assert isinstance(ours, CompiledMlp)
    for hidden, expected_1TH in zip(batches, expected, strict=True):
        torch.testing.assert_close(ours(hidden).double(), expected_1TH, rtol=1e-4, atol=1e-5)
    assert calls == [65]


def test_threads_share_what_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, hidden = family_mlp("qwen3"), torch.randn(1, 3, HIDDEN)
    expected = mlp(hidden)
    calls = count_calls(mlp)
    one, two = compiled(mlp), compiled(family_mlp("qwen3"), 2)
    calls_of_two = count_calls(two.mlp)
    monkeypatch.setattr(packed_matmul, "_SHARED_WORK", 1)
    for ours in (one, two):
        torch.testing.assert_close(ours(hidden), expected)
    assert (calls, calls_of_two) == ([], [3])


def test_a_rows_output_depends_on_no_other_row() -> None:
    ours, hidden = compiled(family_mlp("deepseek-v3")), torch.randn(1, 33, HIDDEN)
    hidden[0, 7] = float("nan")
    together = ours(hidden)
    assert together.isnan().all(dim=2)[0].nonzero().tolist() == [[7]]
    assert all(ours(hidden[:, row : row + 1])[0, 0].equal(together[0, row]) for row in range(33) if row != 7)


def test_rows_may_be_far_apart() -> None:
    ours, hidden = compiled(family_mlp("qwen3")), torch.randn(4, 2 * HIDDEN)[:, 5 : 5 + HIDDEN]
    torch.testing.assert_close(ours(hidden), ours(hidden.contiguous()))


@pytest.mark.parametrize(
    "mlp",
    [
        family_mlp("qwen3", hidden_act="gelu"),
        family_mlp("deepseek-v2", mlp_bias=True),
        family_mlp("deepseek-v3", intermediate_size=70),  # gate and up cannot be joined
    ],
    ids=["gelu", "biases", "half a panel"],
)
def test_other_modules_are_left_alone(mlp: nn.Module) -> None:
    assert compiled(mlp) is mlp


def test_modules_that_are_not_packed_are_left_alone() -> None:
    assert not CompiledMlp.fits(family_mlp("qwen3"))
