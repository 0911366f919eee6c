import pytest
import torch

from experts.ops._triton.quantise_rows import quantise_rows, quantise_rows_reference


@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize("columns", [128, 200, 700])
def test_equals_torch(device, on_card, group, columns):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(5, columns, generator=generator)
    if not on_card:
        # The interpreter rounds to fp8 wrongly; numbers that fp8 holds exactly need no rounding.
        x = x.to(torch.float8_e4m3fn).float()
        x[:, ::64] = 448.0
    x[3] = 0.0
    x = torch.cat([x, torch.ones(5, 8)], dim=1).to(device)[:, :columns]  # strided rows
    codes, scales = quantise_rows(x, group=group)
    expected_codes, expected_scales = quantise_rows_reference(x, group=group)
    assert codes.shape == expected_codes.shape
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0.0)
    differing = (codes.float() != expected_codes.float()).float().mean()
    assert differing <= (1e-3 if on_card else 0.0)  # a scale's last bit may tip a tie
    assert codes[3].float().abs().max() == 0.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter
def test_not_a_number_stays_in_its_row(device, bad):
    x = torch.ones(2, 256, device=device)
    x[1, 130] = bad
    codes, scales = quantise_rows(x, group=128)
    widened = (codes.float().view(2, 2, 128) * scales[:, :, None]).view(2, 256)
    assert torch.equal(widened[0].cpu(), torch.ones(256))
    assert not widened[1, 130].isfinite()
