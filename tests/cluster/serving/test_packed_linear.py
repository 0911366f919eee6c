from __future__ import annotations

import pytest
import torch
from torch import nn

from cluster.serving.packed_linear import PackedLinear, pack_linears
from experts.ops.cpu_threads import ThreadTeam


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@torch.inference_mode()
def test_equals_linear(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 70, bias=bias)
    hidden = torch.randn(1, rows, 48)
    expected = nn.functional.linear(hidden.double(), linear.weight.double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(PackedLinear(linear)(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_packs_plain_float32_layers() -> None:
    class Router(nn.Linear):
        """Like PhimoeTopKRouter: a linear layer with a forward of its own."""

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4).bfloat16(), Router(4, 4)
    )
    pack_linears(model, ThreadTeam(1))
    assert isinstance(model[0], PackedLinear)
    assert isinstance(model[1][0], PackedLinear)
    assert isinstance(model[2], nn.Linear)
    assert isinstance(model[3], Router)
