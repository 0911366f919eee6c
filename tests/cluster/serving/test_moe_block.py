from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from cluster.serving.moe_block import MoeBlock, RouterConnection, wanting_only


class Diary(nn.Module):
    """Stands in for router and shared expert and writes down who was called when."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def route(self, layer: int, hidden_TH: torch.Tensor) -> Any:
        self.lines.append(f"route {layer} {tuple(hidden_TH.shape)}")
        diary = self

        class Reply:
            def result(self) -> torch.Tensor:
                diary.lines.append("result")
                return hidden_TH * 2

        return Reply()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.lines.append("shared")
        return hidden * 10


def family_block() -> nn.Module:
    config = DeepseekV3Config(
        hidden_size=8, moe_intermediate_size=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1
    )
    with torch.device("meta"):
        return DeepseekV3MoE(config)


def test_the_shared_expert_runs_while_experts_are_out() -> None:
    diary = Diary()
    block = MoeBlock(5, family_block(), RouterConnection(router=diary))  # type: ignore[arg-type]
    block.shared_experts = diary
    hidden = torch.ones(1, 3, 8)
    torch.testing.assert_close(block(hidden), hidden * 12)
    assert diary.lines == ["route 5 (3, 8)", "shared", "result"]


def test_only_wanted_rows_of_the_last_layer_are_computed() -> None:
    diary = Diary()
    connection = RouterConnection(router=diary, last_layer=5)  # type: ignore[arg-type]
    blocks = [MoeBlock(layer, family_block(), connection) for layer in (4, 5)]
    hidden = torch.ones(1, 3, 8)
    for block in blocks:
        block.shared_experts = None
        with wanting_only(torch.tensor([2])):
            got = block(hidden)
        assert got[0, :, 0].tolist() == ([2, 2, 2] if block is blocks[0] else [0, 0, 2])
    with wanting_only(torch.tensor([], dtype=torch.long)):
        assert not blocks[1](hidden).any()
    assert blocks[1](hidden).eq(2).all()
    assert diary.lines == ["route 4 (3, 8)", "result", "route 5 (1, 8)", "result", "route 5 (3, 8)", "result"]


def test_torch_has_one_thread_while_experts_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: diary.lines.append(f"{count} threads"))
    block = MoeBlock(5, family_block(), RouterConnection(router=diary, num_threads=3))  # type: ignore[arg-type]
    block.shared_experts = diary
    block(torch.ones(1, 3, 8))
    assert diary.lines == ["1 threads", "route 5 (3, 8)", "shared", "result", "3 threads"]


def test_time_spent_on_the_router_is_counted() -> None:
    connection = RouterConnection(router=Diary())  # type: ignore[arg-type]
    block = MoeBlock(0, family_block(), connection)
    block.shared_experts = None
    block(torch.ones(1, 3, 8))
    assert connection.send_s > 0
    assert connection.wait_s > 0


def test_fits_only_blocks_of_known_parts() -> None:
    block = family_block()
    assert MoeBlock.fits(block)
    block.shared_expert_gate = nn.Linear(8, 1)
    assert not MoeBlock.fits(block)


def test_a_block_without_a_router_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="connect"):
        MoeBlock(0, family_block(), RouterConnection())(torch.ones(1, 3, 8))
