"""Every kernel against float64, over the weights that its codes stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.ops._triton.epilogue import ACTIVATIONS
from experts.ops._triton.grouped_matmul import KERNELS, grouped_matmul
from experts.ops._triton.quantise_rows import quantise_rows_reference
from experts.ops._triton.tiles import tile_table
from experts.ops.activations import activate
from experts.ops.slot_format import SlotFormat
from experts.ops.slots import SlotStorage
from experts.ops.tile_config import TileConfig
from experts.quant.schemes import build_scheme
from experts.spec import ExpertSpec, ExpertWeights

SCHEMES = ("none", "fp8", "fp8_block", "int8", "int4")
DECODE = TileConfig(kernel="decode", rows=16, columns=64, depth=128, warps=4, stages=2)
PREFILL = TileConfig(kernel="prefill", rows=64, columns=128, depth=128, warps=4, stages=2, band=2)
WIDENED_PREFILL = TileConfig(kernel="decode", rows=64, columns=128, depth=128, warps=4, stages=2)
KERNEL_OF_SCHEME = [
    pytest.param(scheme, config, id=f"{scheme}-{kind}")
    for scheme in SCHEMES
    for kind, config in (
        ("decode", DECODE),
        ("prefill", PREFILL if KERNELS[scheme].prefill else WIDENED_PREFILL),
    )
]
# Tensor cores add fp8 products with fewer bits than float32 unless the kernel promotes them.
TOLERANCE = {"none": 1e-5, "fp8": 1e-5, "fp8_block": 1e-5, "int8": 1e-5, "int4": 1e-5}
TOLERANCE_ON_CARD = {"none": 1e-5, "fp8": 5e-3, "fp8_block": 2e-3, "int8": 1e-5, "int4": 1e-5}


def random_expert(spec, generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator)

    halves = 2 if spec.gated else 1
    return ExpertWeights(
        up_2IH=draw(halves * spec.intermediate_size, spec.hidden_size) / spec.hidden_size**0.5,
        down_HI=draw(spec.hidden_size, spec.intermediate_size) / spec.intermediate_size**0.5,
        up_bias_2I=draw(halves * spec.intermediate_size) if spec.bias else None,
        down_bias_H=draw(spec.hidden_size) if spec.bias else None,
    )


def held(scheme, weight, matrices):
    """float64 weights that the codes of `scheme` stand for; gate and up are quantised apart."""
    parts = [scheme.dequantise(scheme.quantise(half), weight.shape[1]) for half in weight.chunk(matrices)]
    return torch.cat(parts).double()


def run(device, spec, scheme_name, dtype, config, experts, x, offsets, token_rows, *, projection):
    """(out, float64 reference) of one projection on `experts`, which lie in shuffled slots."""
    scheme = build_scheme(scheme_name, dtype)
    form = SlotFormat(spec, scheme, ACTIVATIONS[spec.activation])
    storage = SlotStorage(form.layout, device, chunk_bytes=1 << 16, max_slots=64)
    slots = [(7 * i + 3) % 64 for i in range(len(experts))]
    for slot, weights in zip(slots, experts, strict=True):
        form.write(storage.place(slot), weights)
    chosen = form.up if projection == "up" else form.down
    num_rows = len(token_rows)
    tiles = tile_table(
        torch.tensor(slots, dtype=torch.int32, device=device),
        offsets.to(device),
        storage.addresses,
        num_rows=num_rows,
        block_rows=config.rows,
    )
    out = torch.full((num_rows, chosen.out_columns), torch.nan, device=device)
    grouped_matmul(scheme_name, chosen, config, scheme.codes_dtype, x.to(device), token_rows.to(device), tiles, out)
    group = KERNELS[scheme_name].activation_group
    rows = x.double()
    if group is not None:
        codes, scales = quantise_rows_reference(x, group=None if group == "row" else 128)
        scales = scales[:, None] if group == "row" else scales.repeat_interleave(128, 1)
        rows = (codes.double() * scales.double())[:, : x.shape[1]]
    expected = torch.empty(num_rows, chosen.out_columns, dtype=torch.float64)
    for weights, start, end in zip(experts, offsets.tolist(), offsets.tolist()[1:], strict=False):
        if projection == "up":
            matrix = held(scheme, weights.up_2IH.to(dtype), 2 if spec.gated else 1)
            y = rows[token_rows[start:end].long()] @ matrix.T
            y = activate(y if weights.up_bias_2I is None else y + weights.up_bias_2I.double(), spec)
        else:
            y = rows[start:end] @ held(scheme, weights.down_HI.to(dtype), 1).T
            y = y if weights.down_bias_H is None else y + weights.down_bias_H.double()
        expected[start:end] = y
    return out, expected


@pytest.mark.parametrize(("scheme", "config"), KERNEL_OF_SCHEME)
@settings(max_examples=4 if torch.cuda.is_available() else 10, deadline=None)  # a card compiles each example
@given(data=st.data())
def test_against_float64(device, on_card, route, error, scheme, config, data):
    spec = ExpertSpec(
        hidden_size=data.draw(st.sampled_from([16, 128, 208, 288]), label="H"),
        intermediate_size=data.draw(st.sampled_from([16, 80, 128, 176]), label="I"),
        gated=data.draw(st.booleans(), label="gated"),
        bias=data.draw(st.booleans(), label="bias"),
        activation=data.draw(st.sampled_from(["silu", "relu"]), label="activation"),
    )
    projection = data.draw(st.sampled_from(["up", "down"]), label="projection")
    num_tokens = data.draw(st.sampled_from([1, 5, 70] if config.rows == 64 else [1, 20]), label="T")
    num_groups = data.draw(st.integers(1, 4), label="S")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    offsets, token_rows = route(generator, num_tokens, num_groups, density=0.6)
    if not len(token_rows):
        offsets, token_rows = route(generator, num_tokens, num_groups, density=1.0)
    dtypes = [torch.bfloat16, torch.float16] if on_card else [torch.float16]
    dtype = data.draw(st.sampled_from(dtypes), label="dtype")
    experts = [random_expert(spec, generator) for _ in range(num_groups)]
    rows, columns = (num_tokens, spec.hidden_size) if projection == "up" else (len(token_rows), spec.intermediate_size)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    experts = [
        ExpertWeights(
            up_2IH=w.up_2IH.to(dtype), down_HI=w.down_HI.to(dtype), up_bias_2I=w.up_bias_2I, down_bias_H=w.down_bias_H
        )
        for w in experts
    ]
    out, expected = run(device, spec, scheme, dtype, config, experts, x, offsets, token_rows, projection=projection)
    assert error(out, expected) < (TOLERANCE_ON_CARD if on_card else TOLERANCE)[scheme]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_activations_with_limit_and_shift(device, error, activation, gated):
    generator = torch.Generator().manual_seed(0)
    spec = ExpertSpec(
        hidden_size=16,
        intermediate_size=32,
        activation=activation,
        gated=gated,
        bias=True,
        limit=0.7 if gated else None,
        up_shift=1.0 if gated else 0.0,
    )
    x = 3 * torch.randn(6, 16, generator=generator)
    arguments = ([random_expert(spec, generator)], x, torch.tensor([0, 6], dtype=torch.int32), torch.arange(6).int())
    out, expected = run(device, spec, "none", torch.float32, DECODE, *arguments, projection="up")
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize(("scheme", "config"), KERNEL_OF_SCHEME)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter
def test_not_a_number_reaches_its_row_only(device, scheme, config, bad):
    generator = torch.Generator().manual_seed(1)
    spec = ExpertSpec(hidden_size=128, intermediate_size=16, activation="relu", gated=False)
    x = torch.randn(3, 128, generator=generator).half()
    x[1, 5] = bad
    arguments = ([random_expert(spec, generator)], x, torch.tensor([0, 3], dtype=torch.int32), torch.arange(3).int())
    out, _ = run(device, spec, scheme, torch.float16, config, *arguments, projection="up")
    assert out[[0, 2]].isfinite().all()
    # relu turns -inf into 0; nothing else of the row can stay finite
    assert (~out[1].isfinite() | (out[1] == 0.0)).all()
    assert not out[1].isfinite().all()
