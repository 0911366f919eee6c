import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.ops import known_cards
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.tile_config import TileConfig
from experts.ops.triton_backend import TritonBackend
from experts.quant.fp8_block import Fp8Block
from experts.spec import ExpertSpec, ExpertWeights


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, tmp_path, on_card):
    """In the interpreter: decode up to 16 rows an expert, prefill above, so that both run at small sizes."""
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(TritonBackend, "warm", lambda self, slot: None)  # see test_decode_graph.py
    if not on_card:
        decode = TileConfig(kernel="decode", rows=16, columns=64, depth=128, warps=4, stages=2)
        prefill = TileConfig(kernel="prefill", rows=32, columns=128, depth=128, warps=4, stages=2)
        buckets = {bucket: (decode if bucket == 16 else prefill,) for bucket in known_cards.ROW_BUCKETS}
        schemes = dict.fromkeys(("none", "fp8", "fp8_block"), buckets)
        monkeypatch.setattr(known_cards, "KNOWN_CARDS", {"interpreter": schemes})


def random_expert(spec, generator, dtype):
    halves = 2 if spec.gated else 1
    h, i = spec.hidden_size, spec.intermediate_size
    return ExpertWeights(
        up_2IH=(torch.randn(halves * i, h, generator=generator) / h**0.5).to(dtype),
        down_HI=(torch.randn(h, i, generator=generator) / i**0.5).to(dtype),
        up_bias_2I=torch.randn(halves * i, generator=generator) if spec.bias else None,
        down_bias_H=torch.randn(h, generator=generator) if spec.bias else None,
    )


def build(spec, device, quantization="none", dtype=torch.float16):
    return TritonBackend(spec, device=device, dtype=dtype, quantization=quantization)


@settings(max_examples=4 if torch.cuda.is_available() else 10, deadline=None)  # a card compiles each example
@given(
    num_tokens=st.sampled_from([1, 3, 60]),
    num_groups=st.integers(1, 5),
    hidden_size=st.sampled_from([64, 136]),
    intermediate_size=st.sampled_from([48, 136]),
    gated=st.booleans(),
    bias=st.booleans(),
    density=st.sampled_from([0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_forward_against_float64(
    device, route, error, num_tokens, num_groups, hidden_size, intermediate_size, gated, bias, density, seed
):
    generator = torch.Generator().manual_seed(seed)
    spec = ExpertSpec(hidden_size=hidden_size, intermediate_size=intermediate_size, gated=gated, bias=bias)
    backend = build(spec, device)
    experts = [random_expert(spec, generator, torch.float16) for _ in range(num_groups)]
    slots = torch.randperm(30, generator=generator)[:num_groups].int()
    for slot, weights in zip(slots.tolist(), experts, strict=True):
        backend.load(slot, weights)
    offsets, token_rows = route(generator, num_tokens, num_groups, density=density)
    # non-contiguous, as a slice of a wider batch may be
    hidden = torch.randn(num_tokens, 2 * hidden_size, generator=generator).half()[:, ::2]
    weights = torch.rand(len(token_rows), generator=generator)
    partial = backend.forward(hidden, slots, offsets, token_rows, weights)
    expected = expert_mlp_reference(spec, experts, hidden, offsets, token_rows, weights)
    assert partial.dtype == torch.float32
    assert partial.device == hidden.device
    assert error(partial, expected) < 2e-3


@pytest.mark.parametrize(
    ("quantization", "limit"), [("fp8", 0.08), ("fp8_block", 0.08), ("int8", 0.02), ("int4", 0.25)]
)
@pytest.mark.parametrize("num_tokens", [4, 50])
def test_quantised_stays_near_float64(device, route, error, quantization, limit, num_tokens):
    generator = torch.Generator().manual_seed(3)
    spec = ExpertSpec(hidden_size=256, intermediate_size=128)
    backend = build(spec, device, quantization)
    experts = [random_expert(spec, generator, torch.float16) for _ in range(2)]
    for slot, weights in enumerate(experts):
        backend.load(slot, weights)
    offsets, token_rows = route(generator, num_tokens, 2, density=1.0)
    hidden = torch.randn(num_tokens, 256, generator=generator).half()
    weights = torch.rand(len(token_rows), generator=generator)
    partial = backend.forward(hidden, torch.arange(2).int(), offsets, token_rows, weights)
    expected = expert_mlp_reference(spec, experts, hidden, offsets, token_rows, weights)
    assert 1e-4 < error(partial, expected) < limit


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_checkpoints_fp8_blocks(device, route, error, quantization):
    """Kept as they are by `none` (no error of their own), widened for int8."""
    generator = torch.Generator().manual_seed(4)
    intermediate_size = 128
    spec = ExpertSpec(hidden_size=256, intermediate_size=intermediate_size)
    full = random_expert(spec, generator, torch.float32)
    scheme = Fp8Block()
    up, down = scheme.quantise(full.up_2IH), scheme.quantise(full.down_HI)
    held = ExpertWeights(
        up_2IH=up.codes,
        down_HI=down.codes[:, :intermediate_size],
        up_scale=up.scale,
        down_scale=down.scale,
    )
    widened = ExpertWeights(up_2IH=scheme.dequantise(up, 256), down_HI=scheme.dequantise(down, intermediate_size))
    backend = build(spec, device, quantization)
    backend.load(0, held)
    offsets, token_rows = route(generator, 9, 1, density=1.0)
    hidden = torch.randn(9, 256, generator=generator).half()
    weights = torch.ones(9)
    partial = backend.forward(hidden, torch.zeros(1).int(), offsets, token_rows, weights)
    expected = expert_mlp_reference(spec, [widened], hidden, offsets, token_rows, weights)
    assert error(partial, expected) < 0.06


def test_loading_again_replaces_and_freed_rooms_are_used(device, error):
    generator = torch.Generator().manual_seed(5)
    spec = ExpertSpec(hidden_size=64, intermediate_size=32)
    backend = build(spec, device)
    old, new, other = (random_expert(spec, generator, torch.float16) for _ in range(3))
    backend.load(0, old)
    backend.load(1, other)
    backend.free(0)
    backend.load(2, new)
    hidden = torch.randn(1, 64, generator=generator).half()
    call = (torch.tensor([0, 1]).int(), torch.tensor([0]).int(), torch.ones(1))
    for slot, weights in ((1, other), (2, new)):
        partial = backend.forward(hidden, torch.tensor([slot]).int(), *call)
        assert error(partial, expert_mlp_reference(spec, [weights], hidden, *call)) < 2e-3


def test_no_rows_give_zeros(device):
    spec = ExpertSpec(hidden_size=64, intermediate_size=32)
    backend = build(spec, device)
    empty = torch.zeros(0, dtype=torch.int32)
    partial = backend.forward(torch.ones(2, 64), empty, torch.zeros(1).int(), empty, torch.zeros(0))
    assert torch.equal(partial, torch.zeros(2, 64))


def test_what_the_kernels_lack_is_named(device):
    spec = ExpertSpec(hidden_size=64, intermediate_size=32, activation="tanh")
    with pytest.raises(ConfigError, match=r"'tanh'.*silu"):
        build(spec, device)
    with pytest.raises(ConfigError, match=r"model\.quantization: 'fp16'.*int8"):
        build(ExpertSpec(hidden_size=64, intermediate_size=32), device, "fp16")
