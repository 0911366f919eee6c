from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from cluster.serving.compiled_norm import CompiledNorm, compile_norms


def mixtral_norm(size: int) -> MixtralRMSNorm:
    torch.manual_seed(0)
    norm = MixtralRMSNorm(size, eps=1e-5).requires_grad_(False)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 5, 512), (0, 64), (3, 2, 100)])
def test_rows_are_those_of_the_familys_norm(shape: tuple[int, ...]) -> None:
    norm = mixtral_norm(shape[-1])
    hidden = torch.randn(shape) * 30
    torch.testing.assert_close(CompiledNorm(norm)(hidden), norm.double()(hidden.double()).float())


def test_rows_may_be_far_apart() -> None:
    norm = mixtral_norm(16)
    hidden = torch.randn(4, 40)[:, 3:19]
    torch.testing.assert_close(CompiledNorm(norm)(hidden), norm(hidden))


def test_nan_stays_in_its_row() -> None:
    hidden = torch.randn(3, 16)
    hidden[1, 4] = float("nan")
    assert CompiledNorm(mixtral_norm(16))(hidden).isnan().all(dim=1).tolist() == [False, True, False]


class OtherRMSNorm(MixtralRMSNorm):
    """Says what Mixtral's says and computes something else, as Gemma's does."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states


def test_only_what_computes_the_same_is_replaced() -> None:
    model = nn.ModuleDict({"plain": mixtral_norm(16), "gemma": GemmaRMSNorm(16), "other": OtherRMSNorm(16)})
    model["narrow"] = mixtral_norm(16).to(torch.bfloat16)
    model["layer"] = nn.LayerNorm(16)
    kinds = {name: type(module) for name, module in model.items()}
    compile_norms(model)
    assert isinstance(model["plain"], CompiledNorm)
    assert {name: type(module) for name, module in model.items()} == kinds | {"plain": CompiledNorm}
