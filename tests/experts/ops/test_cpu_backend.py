"""The CPU backend against a float64 reference."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.ops.cpu_backend import CpuBackend
from experts.ops.cpu_format import FORMATS
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.sort import SortedRows, sort_by_expert
from experts.spec import ExpertSpec, ExpertWeights

NUM_EXPERTS = 5
TOLERANCE = {"none": 1e-6, "fp16": 2e-3, "int8": 2e-2}


def random_weights(spec: ExpertSpec, generator: torch.Generator) -> ExpertWeights:
    rows = spec.intermediate_size * (2 if spec.gated else 1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    return ExpertWeights(
        up_2IH=draw(rows, spec.hidden_size),
        down_HI=draw(spec.hidden_size, spec.intermediate_size),
        up_bias_2I=draw(rows) if spec.bias else None,
        down_bias_H=draw(spec.hidden_size) if spec.bias else None,
    )


def random_rows(num_tokens: int, top_k: int, generator: torch.Generator) -> SortedRows:
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)])
    return sort_by_expert(ids_TK, torch.rand(num_tokens, top_k, generator=generator))


specs = st.builds(
    ExpertSpec,
    hidden_size=st.sampled_from([1, 7, 32, 130]),
    intermediate_size=st.sampled_from([1, 5, 48]),
    activation=st.sampled_from(["silu", "relu"]),  # the others: test_activations.py
    gated=st.booleans(),
    bias=st.booleans(),
    limit=st.sampled_from([None, 0.5]),
    up_shift=st.sampled_from([0.0, 1.0]),
)


@pytest.mark.parametrize("quantization", FORMATS)
@given(
    spec=specs,
    num_tokens=st.integers(1, 40),
    top_k=st.integers(1, NUM_EXPERTS),
    seed=st.integers(0, 2**32),
    num_threads=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_float64_reference(
    quantization: str, spec: ExpertSpec, num_tokens: int, top_k: int, seed: int, num_threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights_E = [random_weights(spec, generator) for _ in range(NUM_EXPERTS)]
    backend = CpuBackend(spec, quantization=quantization, num_threads=num_threads)
    for slot, weights in enumerate(weights_E):
        backend.load(slot + 3, weights)
    hidden_TH = torch.randn(num_tokens, spec.hidden_size, generator=generator)
    rows = random_rows(num_tokens, top_k, generator)
    got = backend.forward(hidden_TH, rows.expert_ids_S + 3, *rows[1:])
    expected = expert_mlp_reference(spec, [weights_E[e] for e in rows.expert_ids_S.tolist()], hidden_TH, *rows[1:])
    assert got.dtype is torch.float32
    # Sums may cancel, so errors are measured against what goes in as well.
    scale = expected.norm() + hidden_TH.norm()
    assert (got - expected).norm() / scale < TOLERANCE[quantization]


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_token_does_not_depend_on_its_batch(quantization: str) -> None:
    generator = torch.Generator().manual_seed(1)
    spec = ExpertSpec(hidden_size=96, intermediate_size=64)
    backend = CpuBackend(spec, quantization=quantization, num_threads=2)
    for slot in range(NUM_EXPERTS):
        backend.load(slot, random_weights(spec, generator))
    hidden_TH = torch.randn(33, 96, generator=generator)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(33)])
    weights_TK = torch.rand(33, 2, generator=generator)
    together = backend.forward(hidden_TH, *sort_by_expert(ids_TK, weights_TK))
    for t in range(33):
        alone = backend.forward(hidden_TH[t : t + 1], *sort_by_expert(ids_TK[t : t + 1], weights_TK[t : t + 1]))
        torch.testing.assert_close(together[t : t + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", FORMATS)
def test_nan_and_inf_stay_with_their_token(quantization: str) -> None:
    generator = torch.Generator().manual_seed(2)
    spec = ExpertSpec(hidden_size=16, intermediate_size=8)
    backend = CpuBackend(spec, quantization=quantization)
    for slot in range(NUM_EXPERTS):
        backend.load(slot, random_weights(spec, generator))
    hidden_TH = torch.randn(3, 16, generator=generator)
    hidden_TH[0, 3], hidden_TH[1, 3] = float("nan"), float("inf")
    got = backend.forward(hidden_TH, *random_rows(3, 2, generator))
    assert got[0].isnan().all()
    assert not got[1].isfinite().any()
    assert got[2].isfinite().all()


def test_more_and_fewer_threads_change_no_result() -> None:
    generator = torch.Generator().manual_seed(3)
    spec = ExpertSpec(hidden_size=32, intermediate_size=48)
    backend = CpuBackend(spec, num_threads=1)
    for slot in range(NUM_EXPERTS):
        backend.load(slot, random_weights(spec, generator))
    hidden_TH, rows = torch.randn(50, 32, generator=generator), random_rows(50, 3, generator)
    alone_TH = backend.forward(hidden_TH, *rows)
    before = set(threading.enumerate())
    for num_threads in (3, 1):
        backend.use_threads(num_threads)
        assert num_threads == 1 or len(set(threading.enumerate()) - before) == 2
        torch.testing.assert_close(backend.forward(hidden_TH, *rows), alone_TH)


def test_threads_join_a_caller_in_inference_mode() -> None:
    generator = torch.Generator().manual_seed(5)
    spec = ExpertSpec(hidden_size=32, intermediate_size=48)
    backend = CpuBackend(spec, num_threads=2)
    experts = [random_weights(spec, generator) for _ in range(NUM_EXPERTS)]
    for slot, weights in enumerate(experts):
        backend.load(slot, weights)
    hidden_TH = torch.randn(400, spec.hidden_size, generator=generator)
    rows = random_rows(400, 2, generator)
    with torch.inference_mode():
        for _ in range(20):  # either thread may have been fast enough to do all of one
            partial_TH = backend.forward(hidden_TH, *rows)
    expected_TH = expert_mlp_reference(spec, experts, hidden_TH, *rows[1:])
    torch.testing.assert_close(partial_TH.double(), expected_TH, atol=1e-5, rtol=1e-5)


def test_tokens_without_experts_get_zero_and_an_empty_call_an_empty_answer() -> None:
    generator = torch.Generator().manual_seed(3)
    spec = ExpertSpec(hidden_size=16, intermediate_size=8)
    backend = CpuBackend(spec)
    backend.load(0, random_weights(spec, generator))
    ids_TK = torch.tensor([[-1], [0], [-1]])
    got = backend.forward(torch.randn(3, 16), *sort_by_expert(ids_TK, torch.ones(3, 1)))
    assert got[0].eq(0).all()
    assert got[2].eq(0).all()
    assert got[1].ne(0).all()
    nothing = sort_by_expert(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1))
    assert backend.forward(torch.empty(0, 16), *nothing).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_lose_nothing_in_half_the_memory(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    spec = ExpertSpec(hidden_size=256, intermediate_size=128)
    plain = random_weights(spec, generator)
    weights = ExpertWeights(up_2IH=plain.up_2IH.to(dtype), down_HI=plain.down_HI.to(dtype))
    backend = CpuBackend(spec)
    backend.load(0, weights)
    backend.load(1, plain)
    assert backend.nbytes(0) * 2 == backend.nbytes(1) == 3 * 256 * 128 * 4
    hidden_TH = torch.randn(9, 256, generator=generator)
    rows = sort_by_expert(torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    expected = expert_mlp_reference(spec, [weights], hidden_TH, *rows[1:])
    assert (backend.forward(hidden_TH, *rows) - expected).norm() / expected.norm() < 1e-6


def test_fp16_refuses_weights_out_of_its_range() -> None:
    spec = ExpertSpec(hidden_size=64, intermediate_size=32)
    huge = ExpertWeights(up_2IH=torch.full((64, 64), 1e6).bfloat16(), down_HI=torch.ones(64, 32).bfloat16())
    with pytest.raises(ConfigError, match="fp16 ends at 65504, but a weight of this checkpoint is 999424"):
        CpuBackend(spec, quantization="fp16").load(0, huge)


def test_experts_of_different_dtypes_meet_in_one_call() -> None:
    generator = torch.Generator().manual_seed(6)
    spec = ExpertSpec(hidden_size=64, intermediate_size=32)
    weights_E = [random_weights(spec, generator) for _ in range(NUM_EXPERTS)]
    for index in (1, 2):
        up, down = weights_E[index].up_2IH.bfloat16(), weights_E[index].down_HI.bfloat16()
        weights_E[index] = ExpertWeights(up_2IH=up, down_HI=down)
    backend = CpuBackend(spec)
    for slot, weights in enumerate(weights_E):
        backend.load(slot, weights)
    hidden_TH, rows = torch.randn(9, 64, generator=generator), random_rows(9, NUM_EXPERTS, generator)
    expected_TH = expert_mlp_reference(spec, weights_E, hidden_TH, *rows[1:])
    torch.testing.assert_close(backend.forward(hidden_TH, *rows).double(), expected_TH, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_and_rows_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(4)
    spec = ExpertSpec(hidden_size=64, intermediate_size=32)
    weights = random_weights(spec, generator)
    weights = ExpertWeights(up_2IH=weights.up_2IH.bfloat16(), down_HI=weights.down_HI.bfloat16())
    backend = CpuBackend(spec)
    backend.load(0, weights)
    hidden_TH = torch.randn(9, 64, generator=generator).bfloat16()
    rows = sort_by_expert(torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    expected = expert_mlp_reference(spec, [weights], hidden_TH, *rows[1:])
    torch.testing.assert_close(backend.forward(hidden_TH, *rows).double(), expected, rtol=1e-5, atol=1e-6)


def test_float8_blocks_are_widened_at_load() -> None:
    generator = torch.Generator().manual_seed(5)
    spec = ExpertSpec(hidden_size=200, intermediate_size=136)
    weights = random_weights(spec, generator)
    up_scale = torch.rand(3, 2, generator=generator) + 0.5
    down_scale = torch.rand(2, 2, generator=generator) + 0.5
    eight = ExpertWeights(
        up_2IH=weights.up_2IH.to(torch.float8_e4m3fn),
        down_HI=weights.down_HI.to(torch.float8_e4m3fn),
        up_scale=up_scale,
        down_scale=down_scale,
    )
    wide_up, wide_down = eight.up_2IH.float(), eight.down_HI.float()
    for i in range(272):
        for j in range(200):
            wide_up[i, j] *= up_scale[i // 128, j // 128]
    for i in range(200):
        for j in range(136):
            wide_down[i, j] *= down_scale[i // 128, j // 128]
    hidden_TH = torch.randn(4, 200, generator=generator)
    rows = sort_by_expert(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    backend = CpuBackend(spec)
    backend.load(0, eight)
    wide = ExpertWeights(up_2IH=wide_up, down_HI=wide_down)
    expected = expert_mlp_reference(spec, [wide], hidden_TH, *rows[1:])
    torch.testing.assert_close(backend.forward(hidden_TH, *rows).double(), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_quantization_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="'fp8' needs a GPU; on CPU use one of none, fp16, int8"):
        CpuBackend(ExpertSpec(hidden_size=4, intermediate_size=4), quantization="fp8")
