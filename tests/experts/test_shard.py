"""Slots come and go; calls see whole experts or a clear refusal."""

from __future__ import annotations

import pytest
import torch

from experts.errors import ExpertNotResident, RequestError
from experts.ops.cpu_backend import CpuBackend
from experts.shard import ExpertShard
from experts.spec import ExpertCall, ExpertKey, ExpertSpec, ExpertWeights

SPEC = ExpertSpec(hidden_size=4, intermediate_size=4, activation="relu", gated=False)


def scaled_identity(factor: float) -> ExpertWeights:
    return ExpertWeights(up_2IH=torch.eye(4) * factor, down_HI=torch.eye(4))


def ask(layer: int, *experts: int, width: int = 4) -> ExpertCall:
    """Each expert is asked for the one token, a row of ones, with weight 1."""
    return ExpertCall(
        layer=layer,
        hidden_TH=torch.ones(1, width),
        expert_ids_S=torch.tensor(experts, dtype=torch.int32),
        offsets_S1=torch.arange(len(experts) + 1, dtype=torch.int32),
        token_rows_R=torch.zeros(len(experts), dtype=torch.int32),
        weights_R=torch.ones(len(experts)),
    )


class CountingBackend(CpuBackend):
    """Remembers which slots are in use."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.in_use: set[int] = set()

    def load(self, slot: int, weights: ExpertWeights) -> None:
        assert slot not in self.in_use
        self.in_use.add(slot)
        super().load(slot, weights)

    def free(self, slot: int) -> None:
        self.in_use.remove(slot)
        super().free(slot)


def test_the_right_expert_of_the_right_layer_answers() -> None:
    shard = ExpertShard(SPEC, CountingBackend())
    for layer, expert in ((0, 3), (0, 1), (5, 3)):
        shard.load(ExpertKey(layer, expert), scaled_identity(10 * layer + expert), checksum=layer)
    assert shard.forward(ask(0, 1)).tolist() == [[1.0] * 4]
    assert shard.forward(ask(0, 1, 3)).tolist() == [[4.0] * 4]
    assert shard.forward(ask(5, 3)).tolist() == [[53.0] * 4]
    assert shard.checksums == {ExpertKey(0, 3): 0, ExpertKey(0, 1): 0, ExpertKey(5, 3): 5}


def test_freed_slots_are_used_again() -> None:
    backend = CountingBackend()
    shard = ExpertShard(SPEC, backend)
    for expert in range(3):
        shard.load(ExpertKey(0, expert), scaled_identity(expert), checksum=0)
    shard.free(ExpertKey(0, 1))
    assert backend.in_use == {0, 2}
    shard.load(ExpertKey(1, 9), scaled_identity(9), checksum=0)
    assert backend.in_use == {0, 1, 2}
    assert shard.forward(ask(1, 9)).tolist() == [[9.0] * 4]
    assert set(shard.checksums) == {ExpertKey(0, 0), ExpertKey(0, 2), ExpertKey(1, 9)}


@pytest.mark.parametrize(("layer", "expert"), [(0, 1), (0, 9), (3, 0)])
def test_an_expert_that_is_not_loaded_is_named(layer: int, expert: int) -> None:
    shard = ExpertShard(SPEC, CountingBackend())
    shard.load(ExpertKey(0, 0), scaled_identity(1), checksum=0)
    with pytest.raises(ExpertNotResident, match=f"expert {expert} of layer {layer} is not held here"):
        shard.forward(ask(layer, expert))


def test_rows_of_another_width_are_refused() -> None:
    shard = ExpertShard(SPEC, CountingBackend())
    with pytest.raises(RequestError, match=r"hidden\.shape: rows of 5 values, but these experts take 4"):
        shard.forward(ask(0, 0, width=5))
