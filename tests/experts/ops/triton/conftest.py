"""Kernels on the card where there is one, else in Triton's interpreter, which tests/conftest.py chooses.

The interpreter computes bf16 wrongly and says nothing: fp16 and fp32 only there.
"""

import pytest
import torch

from experts.ops._triton import grouped_matmul as grouped_matmul_module
from experts.ops._triton.quantise_rows import quantise_rows_reference

ON_CARD = torch.cuda.is_available()


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda", 0) if ON_CARD else torch.device("cpu")


@pytest.fixture(scope="session")
def on_card():
    return ON_CARD


@pytest.fixture(autouse=not ON_CARD)
def exact_fp8(monkeypatch):
    """The interpreter rounds float32 to fp8 wrongly (a carry is lost): quantise activations in torch there."""
    monkeypatch.setattr(grouped_matmul_module, "quantise_rows", quantise_rows_reference)


@pytest.fixture(scope="session")
def error():
    """||out - expected|| / ||expected||, NaN and Inf included where both have them."""

    def relative(out, expected):
        out, expected = out.double().cpu(), expected.double().cpu()
        assert out.shape == expected.shape
        assert torch.equal(out.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert torch.equal(out[~finite].nan_to_num(), expected[~finite].nan_to_num())
        norm = expected[finite].norm()
        return float((out[finite] - expected[finite]).norm() / (norm if norm else 1.0))

    return relative


@pytest.fixture(scope="session")
def route():
    """Random routing: (offsets_S1, token_rows_R) with at most one row of a token in a group, ascending in each."""

    def draw(generator, num_tokens, num_groups, *, density=0.5):
        hit_ST = torch.rand(num_groups, num_tokens, generator=generator) < density
        offsets_S1 = torch.zeros(num_groups + 1, dtype=torch.int32)
        offsets_S1[1:] = hit_ST.sum(1).cumsum(0)
        return offsets_S1, hit_ST.nonzero()[:, 1].int().contiguous()

    return draw
