"""What holds for every scheme; the files beside this one say what is particular."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.quant.schemes import build_scheme

# Largest error of a weight over the largest weight that shares its scale: half a step of the format.
HALF_STEP = {"none": 0.0, "fp8": 1 / 28, "fp8_block": 1 / 28, "int8": 0.5 / 127, "int4": 1 / 8}
SCHEMES = list(HALF_STEP)


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 200), columns=st.integers(1, 300), seed=st.integers(0, 999))
def test_round_trip(name, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scheme = build_scheme(name, torch.float32)
    held = scheme.quantise(weight)
    assert tuple(held.codes.shape) == scheme.codes_shape(rows, columns)
    assert held.codes.dtype == scheme.codes_dtype
    assert (None if held.scale is None else tuple(held.scale.shape)) == scheme.scale_shape(rows, columns)
    widened = scheme.dequantise(held, columns)
    assert widened.shape == weight.shape
    assert (widened - weight).abs().max() <= HALF_STEP[name] * weight.abs().max() * 1.001
    # What was representable stays as it is.
    torch.testing.assert_close(scheme.dequantise(scheme.quantise(widened), columns), widened, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name):
    scheme = build_scheme(name, torch.float32)
    assert scheme.dequantise(scheme.quantise(torch.zeros(3, 130)), 130).abs().max() == 0


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_is_never_hidden(name, bad):
    weight = torch.ones(300, 300)
    weight[200, 200] = bad
    scheme = build_scheme(name, torch.float32)
    widened = scheme.dequantise(scheme.quantise(weight), 300)
    assert not widened[200, 200].isfinite()
    assert widened[0].isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
def test_strided_weights(name):
    weight = torch.randn(130, 300, generator=torch.Generator().manual_seed(0))
    scheme = build_scheme(name, torch.float32)
    strided = scheme.quantise(weight.T.contiguous().T)
    for got, expected in zip(strided, scheme.quantise(weight), strict=True):
        assert (got is None and expected is None) or torch.equal(got.float(), expected.float())


def test_unknown_scheme():
    with pytest.raises(ConfigError, match=r"model\.quantization: 'int3'.*fp8_block.*int4"):
        build_scheme("int3", torch.float32)
