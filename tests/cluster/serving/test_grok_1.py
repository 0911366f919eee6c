"""Grok-1 from checkpoint to logits, against its published formulas written out in float64 over the same tensors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.grok_1 import Grok1Config
from cluster.serving.kv_cache import KVCache
from cluster.serving.skeleton import load_skeleton
from experts.group import ExpertGroup
from experts.ops.cpu_backend import CpuBackend
from experts.spec import ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.in_process import InProcessTransport

CPU = torch.device("cpu")


def published(tensors: dict[str, Tensor], config: Grok1Config, tokens_T: Tensor) -> Tensor:
    """Logits [T, V], float64: xai-org/grok-1, model.py, for one sequence without a cache."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    length, heads, kv_heads = len(tokens_T), config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads

    def rms_norm(x: Tensor, name: str) -> Tensor:
        mean_squared = x.square().mean(dim=-1, keepdim=True)
        return weights[name] * (x / torch.sqrt(mean_squared + 1e-5))

    def rotate(x_THD: Tensor) -> Tensor:
        inv_freq = 1.0 / 10000 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        phase = torch.outer(torch.arange(length, dtype=torch.float64), inv_freq).tile(1, 2)[:, None, :]
        x1, x2 = x_THD.chunk(2, dim=-1)
        return x_THD * phase.cos() + torch.cat((-x2, x1), dim=-1) * phase.sin()

    def attention(x_TH: Tensor, stem: str) -> Tensor:
        query = rotate((x_TH @ weights[f"{stem}.q_proj.weight"].T).view(length, heads, size))
        key = rotate((x_TH @ weights[f"{stem}.k_proj.weight"].T).view(length, kv_heads, size))
        value = (x_TH @ weights[f"{stem}.v_proj.weight"].T).view(length, kv_heads, size)
        out = torch.empty(length, heads, size, dtype=torch.float64)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            logits = query[:, head] @ key[:, kv_head].T * config.attn_output_multiplier
            logits = config.max_attn_value * torch.tanh(logits / config.max_attn_value)
            logits = torch.where(torch.ones(length, length).tril().bool(), logits, -1e30)
            out[:, head] = logits.softmax(dim=-1) @ value[:, kv_head]
        return out.view(length, -1) @ weights[f"{stem}.o_proj.weight"].T

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def experts(x_TH: Tensor, stem: str) -> Tensor:
        probs_TE = (x_TH @ weights[f"{stem}.gate.weight"].T).softmax(dim=-1)
        out = torch.zeros_like(x_TH)
        for row, (x, probs) in enumerate(zip(x_TH, probs_TE, strict=True)):
            for expert in probs.argsort(descending=True)[:2].tolist():
                name = f"{stem}.experts.{expert}"
                up = weights[f"{name}.linear_v.weight"] @ x
                inner = gelu(weights[f"{name}.linear.weight"] @ x) * up
                out[row] += probs[expert] * (weights[f"{name}.linear_1.weight"] @ inner)
        return out

    embeddings = weights["model.embed_tokens.weight"]
    h = embeddings[tokens_T] * config.embedding_multiplier_scale
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        attended = attention(rms_norm(h, f"{stem}.pre_attn_norm.scale"), f"{stem}.attn")
        h = h + rms_norm(attended, f"{stem}.post_attn_norm.scale")
        dense = experts(rms_norm(h, f"{stem}.pre_moe_norm.scale"), f"{stem}.moe_block")
        h = h + rms_norm(dense, f"{stem}.post_moe_norm.scale")
    return rms_norm(h, "model.norm.scale") @ embeddings.T * config.output_multiplier_scale


@torch.inference_mode()
def served(directory: Path, tokens_T: Tensor, chunks: list[int]) -> Tensor:
    """Logits [T, V] of skeleton, router and two groups, the prompt in chunks."""
    checkpoint = Checkpoint(directory)
    skeleton = load_skeleton(checkpoint, dtype=torch.float32, device=CPU)
    layout = describe_experts(checkpoint, checkpoint.config())
    holders = balanced(layout.experts_per_layer, 2, nodes_of_groups=None)
    groups = {}
    for number in range(2):
        groups[f"g{number}"] = ExpertGroup(number, layout.spec, CpuBackend(layout.spec))
        keys = [ExpertKey(layer, e) for layer, held in holders.items() for e, by in enumerate(held) if number in by]
        groups[f"g{number}"].assign(layout, checkpoint, keys)
    router = Router(InProcessTransport(groups), skeleton.gates, recovery_timeout_s=5)
    replicas = tuple(GroupReplica(group=n, replica=name, node="here", address="") for n, name in enumerate(groups))
    router.update(PlacementTable(version=1, num_groups=2, holders=holders, replicas=replicas))
    skeleton.connect(router)
    cache = KVCache(skeleton.kv_layout, memory=1 << 24, max_num_seqs=1, max_model_len=512)
    slot = cache.allocate(len(tokens_T))
    assert slot is not None
    logits = []
    for part_T in tokens_T.split(chunks):
        positions_T = torch.arange(slot.length, slot.length + len(part_T))
        batch = AttentionBatch([Chunk(slot=slot, num_tokens=len(part_T))], CPU)
        logits.append(skeleton.forward(part_T, positions_T, batch, torch.arange(len(part_T))))
        slot.length += len(part_T)
    return torch.cat(logits)


def test_logits_equal_the_published_formulas(tiny_checkpoint: Callable[[str], Path]) -> None:
    directory = tiny_checkpoint("grok-1")
    config = AutoConfig.from_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    tokens_T = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(3))
    expected = published(tensors, config, tokens_T)
    torch.testing.assert_close(served(directory, tokens_T, [25, 1, 1, 13]).double(), expected, rtol=0, atol=1e-4)
    for changed in ("attn_output_multiplier", "max_attn_value", "embedding_multiplier_scale"):
        other = published(tensors, Grok1Config(**{**config.to_dict(), changed: 1.0}), tokens_T)
        assert (other - expected).abs().max() > 0.05, changed


def test_a_published_config_is_read_as_it_is(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The keys of hpcai-tech/grok-1, which names neither activation nor rotary base, and code that is not run."""
    directory = Path(shutil.copytree(tiny_checkpoint("grok-1"), tmp_path / "grok-1"))
    written = json.loads((directory / "config.json").read_text())
    published_keys = {
        "architectures": ["Grok1ModelForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM"},
        "model_type": "grok-1",
        "num_experts": written["num_local_experts"],
        "router_aux_loss_coef": 0.001,
        "torch_dtype": "bfloat16",
    }
    for key in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "attn_output_multiplier", "max_attn_value", "embedding_multiplier_scale"),
        *("output_multiplier_scale", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("num_experts_per_tok", "pad_token_id", "bos_token_id", "eos_token_id"),
    ):
        published_keys[key] = written[key]
    (directory / "config.json").write_text(json.dumps(published_keys))
    (directory / "modeling_grok1.py").write_text("raise SystemExit")
    tokens_T = torch.arange(20)
    ours = served(directory, tokens_T, [20])
    torch.testing.assert_close(ours, served(tiny_checkpoint("grok-1"), tokens_T, [20]), rtol=0, atol=0)
    assert describe_experts(Checkpoint(directory), published_keys).spec.activation == "gelu_tanh"


def test_defaults_are_the_published_models() -> None:
    """xai-org/grok-1, run.py."""
    config = Grok1Config()
    assert (config.num_local_experts, config.num_experts_per_tok, config.hidden_size) == (8, 2, 48 * 128)
    assert config.attn_output_multiplier == pytest.approx(128**-0.5)
    assert config.output_multiplier_scale == pytest.approx(3**-0.5)
    assert config.embedding_multiplier_scale == pytest.approx(6144**0.5)
    assert (config.max_attn_value, config.rms_norm_eps) == (30.0, 1e-5)
