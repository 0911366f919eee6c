"""Compiled layers against the families' own layers, eager and in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from cluster.serving.attention import StepCache
from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.compiled_layer import CompiledLayer
from cluster.serving.compiled_mlp import compile_mlps
from cluster.serving.compiled_norm import compile_norms
from cluster.serving.grouped_query_layer import GroupedQueryLayer
from cluster.serving.kv_cache import KVCache, KVLayout, Slot
from cluster.serving.latent_attention import LatentProjections
from cluster.serving.latent_layer import LatentLayer
from cluster.serving.packed_linear import pack_linears
from experts.ops.cpu_threads import ThreadTeam

# Hidden states end within a panel.
HIDDEN, LAYER = 84, 1
# Two arenas, and sequences that have just begun.
LENGTHS = (0, 1, 2, 61, 255, 300)
_COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "q_lora_rank": None,
    "first_k_dense_replace": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
# Both experts for every token: no gate has to decide alike in float32 and float64.
_MIXTRAL = {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 2}
CASES: dict[str, tuple[Any, Any, str]] = {
    "mixtral": (modeling_mixtral, MixtralConfig(**_MIXTRAL, sliding_window=None), "Mixtral"),
    "mixtral window": (modeling_mixtral, MixtralConfig(**_MIXTRAL, sliding_window=40), "Mixtral"),
    "mixtral one key head a query": (
        modeling_mixtral,
        MixtralConfig(**{**_MIXTRAL, "num_key_value_heads": 4}, sliding_window=None),
        "Mixtral",
    ),
    "mixtral three queries": (
        modeling_mixtral,
        MixtralConfig(**{**_MIXTRAL, "num_attention_heads": 6}, sliding_window=None),
        "Mixtral",
    ),
    "qwen3": (modeling_qwen3_moe, Qwen3MoeConfig(**_GROUPED, attention_bias=True, mlp_only_layers=[LAYER]), "Qwen3Moe"),
    "deepseek-v2": (modeling_deepseek_v2, DeepseekV2Config(**_LATENT), "DeepseekV2"),
    "deepseek-v2 compressed": (
        modeling_deepseek_v2,
        DeepseekV2Config(**{**_LATENT, "q_lora_rank": 64}),
        "DeepseekV2",
    ),
    "deepseek-v3": (modeling_deepseek_v3, DeepseekV3Config(**_LATENT), "DeepseekV3"),
    "deepseek-v3 compressed": (
        modeling_deepseek_v3,
        DeepseekV3Config(**{**_LATENT, "q_lora_rank": 64}, attention_bias=True),
        "DeepseekV3",
    ),
    "deepseek-v3 halves": (modeling_deepseek_v3, DeepseekV3Config(**_LATENT, rope_interleave=False), "DeepseekV3"),
}


@dataclass(eq=False)
class Layer:
    """A family's layer, once as it is in float64 and once with what we put in its place."""

    case: str
    num_threads: int = 1

    def __post_init__(self) -> None:
        module, config, name = CASES[self.case]
        torch.manual_seed(0)
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = "expertmesh"
        self.config._experts_implementation = "eager"
        layer = getattr(module, f"{name}DecoderLayer")(self.config, LAYER).eval().requires_grad_(False)
        for parameter_name, parameter in layer.named_parameters():
            nn.init.normal_(parameter, mean=1 if "norm" in parameter_name else 0, std=0.15)
        self.rotary = getattr(module, f"{name}RotaryEmbedding")(self.config)
        self.reference = copy.deepcopy(layer).double()
        self.reference.self_attn.config = copy.deepcopy(config)
        self.reference.self_attn.config._attn_implementation = "eager"
        parent = nn.Module()
        parent.layer = layer
        latent = hasattr(layer.self_attn, "expand_kv")
        if latent:
            layer.self_attn.latent_projections = LatentProjections(layer.self_attn)
            layer.self_attn.expand_kv = lambda latents, k_rope: (latents, k_rope)
        team = ThreadTeam(self.num_threads)
        pack_linears(parent, team)
        compile_norms(parent)
        compile_mlps(parent, team)
        kind = LatentLayer if latent else GroupedQueryLayer
        assert kind.fits(layer)
        self.familys = layer
        self.ours: CompiledLayer = kind(layer, team)
        layout = KVLayout(
            num_layers=2,
            num_kv_heads=1 if latent else config.num_key_value_heads,
            key_dim=config.kv_lora_rank + config.qk_rope_head_dim if latent else config.head_dim,
            value_dim=config.kv_lora_rank if latent else config.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
            latent=latent,
        )
        self.cache = KVCache(layout, memory=1 << 28, max_num_seqs=32, max_model_len=2048)
        self.latent = latent

    def step(self, module: Callable[..., Any], chunks: Sequence[Chunk], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Outputs of `chunks`, whose hidden states are `rows` ([tokens, H] each), in their order."""
        batch = AttentionBatch(chunks, torch.device("cpu"))
        ordered = [chunks[index] for index in batch.order]
        hidden = torch.cat([rows[index] for index in batch.order])[None]
        positions = torch.cat([torch.arange(chunk.begin, chunk.end) for chunk in ordered])[None]
        output = module(
            hidden_states=hidden,
            position_embeddings=self.rotary(hidden, position_ids=positions),
            attention_mask=None,
            past_key_values=StepCache(batch, latent=self.latent),
            attention_batch=batch,
        )[0]
        for chunk in chunks:
            chunk.slot.length = chunk.end
        lengths = [chunk.num_tokens for chunk in ordered]
        parts = dict(zip(batch.order, output.split(lengths), strict=True))
        return torch.cat([parts[index] for index in range(len(chunks))])

    def slot_with(self, prefix_TH: torch.Tensor) -> Slot:
        """A sequence that has read its prefix, through the family's own."""
        slot = self.cache.allocate(len(prefix_TH) + 1)
        assert slot is not None
        if len(prefix_TH):
            self.step(self.familys, [Chunk(slot=slot, num_tokens=len(prefix_TH))], [prefix_TH])
        return slot

    def expected(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The last token's output in float64, of the whole sequence at once."""
        length = len(hidden_TH)
        positions = torch.arange(length)
        visible = positions[None] <= positions[:, None]
        if window := getattr(self.config, "sliding_window", None):
            visible &= positions[None] > positions[:, None] - window
        mask = torch.zeros(length, length, dtype=torch.double).masked_fill(~visible, float("-inf"))
        embeddings = self.rotary(hidden_TH.double()[None], position_ids=positions[None])
        output: torch.Tensor = self.reference(
            hidden_states=hidden_TH.double()[None], position_embeddings=embeddings, attention_mask=mask[None, None]
        )
        return output[0, -1]


def sequences() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length + 1, HIDDEN) for length in LENGTHS]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("case", list(CASES))
def test_a_step_gives_what_the_familys_own_gives(case: str, num_threads: int) -> None:
    layer, hidden = Layer(case, num_threads), sequences()
    slots = [layer.slot_with(rows_TH[:-1]) for rows_TH in hidden]
    assert len({id(slot.arena) for slot in slots}) == 2
    chunks = [Chunk(slot=slot, num_tokens=1) for slot in slots]
    got_TH = layer.step(layer.ours, chunks, [rows_TH[-1:] for rows_TH in hidden])
    expected_TH = torch.stack([layer.expected(rows_TH) for rows_TH in hidden])
    torch.testing.assert_close(got_TH.double(), expected_TH, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "qwen3", "deepseek-v3"])
def test_what_a_step_writes_is_what_a_prompt_would_have_written(case: str) -> None:
    """A sequence that is decoded token by token, beside another that is read as a whole."""
    layer = Layer(case)
    hidden_TH = sequences()[3]
    slot = layer.slot_with(hidden_TH[:40])
    for position in range(40, len(hidden_TH)):
        one = layer.step(layer.ours, [Chunk(slot=slot, num_tokens=1)], [hidden_TH[position : position + 1]])
    torch.testing.assert_close(one[0].double(), layer.expected(hidden_TH), atol=2e-5, rtol=1e-4)
    whole = layer.slot_with(hidden_TH)
    for name in ("key", "value"):
        rows = [getattr(each.arena, name)[LAYER][each.index, :, : len(hidden_TH)] for each in (slot, whole)]
        torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=1e-5)
    assert not slot.arena.key[1 - LAYER].any()


@pytest.mark.parametrize("case", ["qwen3", "deepseek-v3 compressed"])
def test_a_rows_output_depends_on_no_other_row_and_no_thread(case: str) -> None:
    hidden = [*sequences(), *torch.randn(13, 3, HIDDEN)]  # enough for shares that are not alike
    outputs = []
    for num_threads in (1, 2):
        layer = Layer(case, num_threads)
        slots = [layer.slot_with(rows_TH[:-1]) for rows_TH in hidden]
        chunks = [Chunk(slot=slot, num_tokens=1) for slot in slots]
        outputs.append(layer.step(layer.ours, chunks, [rows_TH[-1:] for rows_TH in hidden]))
    alone = Layer(case)
    for row, rows_TH in enumerate(hidden):
        chunk = Chunk(slot=alone.slot_with(rows_TH[:-1]), num_tokens=1)
        outputs.append(outputs[0].clone())
        outputs[-1][row] = alone.step(alone.ours, [chunk], [rows_TH[-1:]])[0]
    assert all(output.equal(outputs[0]) for output in outputs)


@pytest.mark.parametrize("case", ["qwen3", "deepseek-v3 compressed"])
def test_a_prompts_outputs_depend_on_no_thread(case: str) -> None:
    """A prompt that is cut for several threads, beside rows that decode and a shorter one."""
    outputs = []
    for num_threads in (1, 2, 3):
        layer, hidden = Layer(case, num_threads), sequences()
        rows = {4: 93, 2: 1, 3: 10, 1: 1}
        chunks = [Chunk(slot=layer.slot_with(hidden[which][:-new]), num_tokens=new) for which, new in rows.items()]
        outputs.append(layer.step(layer.ours, chunks, [hidden[which][-new:] for which, new in rows.items()]))
    assert all(output.equal(outputs[0]) for output in outputs)


@pytest.mark.parametrize("case", ["mixtral", "deepseek-v2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(case: str, value: float) -> None:
    layer, hidden = Layer(case), sequences()
    slots = [layer.slot_with(rows_TH[:-1]) for rows_TH in hidden]
    hidden[2][-1, 5] = value
    chunks = [Chunk(slot=slot, num_tokens=1) for slot in slots]
    got_TH = layer.step(layer.ours, chunks, [rows_TH[-1:] for rows_TH in hidden])
    assert got_TH.isnan().all(dim=1).tolist() == [row == 2 for row in range(len(hidden))]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("case", ["mixtral", "mixtral window", "qwen3", "deepseek-v2 compressed", "deepseek-v3"])
@pytest.mark.parametrize("longest", [60, 300])
def test_steps_with_prompts(case: str, longest: int, num_threads: int) -> None:
    """A prompt's beginning, another's end, and a sequence that decodes, in one step."""
    layer, hidden = Layer(case, num_threads), sequences()
    rows = {3: 1, 5: longest, 4: 50, 1: 2}
    slots = {which: layer.slot_with(hidden[which][:-new]) for which, new in rows.items() if which != 5}
    whole = layer.cache.allocate(longest)
    assert whole is not None
    slots[5], hidden[5] = whole, hidden[5][:longest]
    chunks = [Chunk(slot=slots[which], num_tokens=new) for which, new in rows.items()]
    got_TH = layer.step(layer.ours, chunks, [hidden[which][-new:] for which, new in rows.items()])
    expected = [
        layer.expected(hidden[which][: len(hidden[which]) - new + 1 + token])
        for which, new in rows.items()
        for token in range(new)
    ]
    torch.testing.assert_close(got_TH.double(), torch.stack(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "mixtral window", "deepseek-v3 compressed"])
def test_a_long_prompt_in_chunks(case: str) -> None:
    torch.manual_seed(2)
    layer, hidden_TH = Layer(case, num_threads=2), torch.randn(1500, HIDDEN)
    slot = layer.cache.allocate(len(hidden_TH))
    assert slot is not None
    for length in (700, 1, 7, 8, 784):
        first, last = slot.length, slot.length + length
        got_TH = layer.step(layer.ours, [Chunk(slot=slot, num_tokens=length)], [hidden_TH[first:last]])
        torch.testing.assert_close(got_TH[-1].double(), layer.expected(hidden_TH[:last]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "mixtral window", "qwen3", "deepseek-v2", "deepseek-v3 compressed"])
def test_a_lone_prompt_is_shared_by_all_threads(case: str) -> None:
    for num_threads in (1, 2, 3):
        for read, length in ((0, 40), (7, 33), (30, 3), (0, 2), (40, 200)):  # of latents, the third's are not expanded
            layer, hidden_TH = Layer(case, num_threads), sequences()[5]
            slot = layer.slot_with(hidden_TH[:read])
            chunk = Chunk(slot=slot, num_tokens=length)
            got_TH = layer.step(layer.ours, [chunk], [hidden_TH[read : read + length]])
            expected = [layer.expected(hidden_TH[: read + token + 1]) for token in range(length)]
            torch.testing.assert_close(got_TH.double(), torch.stack(expected), atol=2e-5, rtol=1e-4)


def test_other_layers_are_left_alone() -> None:
    config = OlmoeConfig(**_COMMON, num_key_value_heads=2)
    config._attn_implementation = "eager"
    olmoe = nn.ModuleList([modeling_olmoe.OlmoeDecoderLayer(config, 0)])  # norms all heads together
    mixtral = nn.ModuleList([modeling_mixtral.MixtralDecoderLayer(CASES["mixtral"][1], 0)])
    for parent in (olmoe, mixtral):
        compile_norms(parent.requires_grad_(False))
        assert not GroupedQueryLayer.fits(parent[0])  # Mixtral's is not packed
        pack_linears(parent, ThreadTeam(1))
    assert not GroupedQueryLayer.fits(olmoe[0])
    assert GroupedQueryLayer.fits(mixtral[0])
    assert not LatentLayer.fits(mixtral[0])
    mixtral[0].post_attention_layernorm = nn.LayerNorm(HIDDEN)
    assert not GroupedQueryLayer.fits(mixtral[0])
