"""A group holds exactly what it was assigned and answers for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.errors import CheckpointError, ExpertNotResident
from experts.group import ExpertGroup
from experts.ops.cpu_backend import CpuBackend
from experts.ops.sort import sort_by_expert
from experts.spec import ExpertCall, ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts

Make = Callable[..., tuple[Path, torch.nn.Module]]


def call_to(layer: int, expert: int) -> ExpertCall:
    rows = sort_by_expert(torch.tensor([[expert]]), torch.ones(1, 1))
    return ExpertCall(layer=layer, hidden_TH=torch.ones(1, 32), **rows._asdict())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_two_groups_together_compute_transformers_layer(tiny_checkpoint: Make, family: str) -> None:
    directory, model = tiny_checkpoint(family)
    checkpoint = Checkpoint(directory)
    layout = describe_experts(checkpoint, checkpoint.config())
    experts = next(m for name, m in model.named_modules() if name.endswith("layers.1.mlp.experts"))
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(17, 32, generator=generator)
    ids_TK = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(17)])
    weights_TK = torch.rand(17, 3, generator=generator)
    got = torch.zeros(17, 32)
    for number in range(2):
        group = ExpertGroup(number, layout.spec, CpuBackend(layout.spec))
        mine = [expert for expert in range(6) if expert % 2 == number]
        group.assign(layout, checkpoint, [ExpertKey(1, expert) for expert in mine])
        own_ids_TK = torch.where(ids_TK % 2 == number, ids_TK, -1)
        rows = sort_by_expert(own_ids_TK, weights_TK)
        got += group.forward(ExpertCall(layer=1, hidden_TH=hidden_TH, **rows._asdict()))
    with torch.no_grad():
        expected = experts(hidden_TH, ids_TK, weights_TK)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_assign_loads_and_frees_the_difference(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("mixtral")[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    group = ExpertGroup(0, layout.spec, CpuBackend(layout.spec))
    assert group.describe().checksums == {}
    first = [ExpertKey(0, 1), ExpertKey(2, 4)]
    group.assign(layout, checkpoint, first)
    read = checkpoint.bytes_read
    assert list(group.describe().checksums) == first
    answer = group.forward(call_to(2, 4))
    progress: list[tuple[int, int]] = []
    group.assign(layout, checkpoint, [ExpertKey(2, 4), ExpertKey(0, 0)], lambda *n: progress.append(n))
    assert checkpoint.bytes_read - read == read // 2
    assert progress == [(read // 2, read // 2)]
    assert list(group.describe().checksums) == [ExpertKey(0, 0), ExpertKey(2, 4)]
    torch.testing.assert_close(group.forward(call_to(2, 4)), answer, rtol=0, atol=0)
    with pytest.raises(ExpertNotResident):
        group.forward(call_to(0, 1))


def test_a_failed_assign_keeps_what_was_there(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("mixtral")[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    group = ExpertGroup(0, layout.spec, CpuBackend(layout.spec))
    group.assign(layout, checkpoint, [ExpertKey(0, 1)])
    with pytest.raises(CheckpointError, match="no expert 50 in layer 0"):
        group.assign(layout, checkpoint, [ExpertKey(0, 50)])
    assert list(group.describe().checksums) == [ExpertKey(0, 1)]


def test_describe_says_what_and_where(loaded_group: ExpertGroup) -> None:
    described = loaded_group.describe()
    assert (described.group, described.device, described.spec.hidden_size) == (2, "cpu", 32)
    assert len(set(described.checksums.values())) == 12
