"""Everything of a model but its experts: transformers' modules, our MoE blocks, our attention function.

The model is built on the meta device and its experts are taken out before anything is materialised; the rest is read
tensor by tensor through transformers' own loading, which knows each family's renames and conversions. Code that comes
with a checkpoint is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from cluster.serving import attention, moe_block
from cluster.serving.attention_batch import AttentionBatch
from cluster.serving.compiled_decode import CompiledDecode
from cluster.serving.compiled_layer import CompiledLayer
from cluster.serving.compiled_mlp import compile_mlps
from cluster.serving.compiled_norm import compile_norms
from cluster.serving.grouped_query_layer import GroupedQueryLayer
from cluster.serving.kv_cache import KVLayout
from cluster.serving.latent_attention import LatentProjections
from cluster.serving.latent_layer import LatentLayer
from cluster.serving.model_config import model_config
from cluster.serving.moe_block import ExpertRouter, MoeBlock, RouterConnection, wanting_only
from cluster.serving.packed_linear import pack_linears
from cluster.serving.rope_reach import rope_reach
from experts.errors import CheckpointError
from experts.ops.cpu_threads import ThreadTeam
from experts.weights.checkpoint import Checkpoint
from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config
from router_service.gating.gate import Gate


class ModelSkeleton:
    """A causal LM whose experts are behind a router.

    gates: layer -> gate, for the router; empty where the family's own gates stay in the model
    team:  threads that share a step's work on a CPU
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gates: Mapping[int, Gate],
        kv_layout: KVLayout,
        eos_token_ids: frozenset[int],
        team: ThreadTeam | None = None,
    ) -> None:
        self.model = model
        self.gates = gates
        self.kv_layout = kv_layout
        self.eos_token_ids = eos_token_ids
        self.device = kv_layout.device
        config: Any = model.config
        self.vocab_size: int = config.vocab_size
        self.max_position_embeddings = rope_reach(config)
        self.connection: RouterConnection = model.router_connection  # type: ignore[assignment]
        layers = getattr(getattr(model, "model", None), "layers", ())
        self._team = team or ThreadTeam(1)
        self._decode: CompiledDecode | None = None
        self._is_compiled = len(layers) > 0 and all(isinstance(layer, CompiledLayer) for layer in layers)

    def connect(self, router: ExpertRouter) -> None:
        """Send expert work to `router`, which was built with `gates`."""
        self.connection.router = router
        if self._is_compiled:
            layers: Any = self.model.model.layers  # type: ignore[union-attr]
            self._decode = CompiledDecode.of(layers, self.gates, router, self._team)

    def forward(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        batch: AttentionBatch,
        logits_rows: torch.Tensor,
    ) -> torch.Tensor:
        """One step of all sequences in `batch`'s order; logits [len(logits_rows), vocabulary], float32."""
        with wanting_only(logits_rows):
            return self._forward(input_ids_T, positions_T, batch, logits_rows)

    def _forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, batch: AttentionBatch, logits_rows: torch.Tensor
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "position_ids": positions_T[None],
            "past_key_values": attention.StepCache(batch, latent=self.kv_layout.latent),
            "use_cache": True,
            "attention_batch": batch,
        }
        if self._is_compiled:
            return self._forward_compiled(input_ids_T[None], logits_rows, arguments)
        output = self.model(input_ids=input_ids_T[None], logits_to_keep=logits_rows, **arguments)
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def _forward_compiled(
        self, input_ids_1T: torch.Tensor, logits_rows: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """What the model's own forward does, of which little is left: what it does besides takes as long as a layer."""
        decoder: Any = self.model.model
        hidden_1TH = decoder.embed_tokens(input_ids_1T)
        rope = decoder.rotary_emb(hidden_1TH, position_ids=arguments["position_ids"])
        at, decode = 0, self._decode
        while at < len(decoder.layers):
            run = None
            if decode is not None and at == decode.first:
                run = decode.run(hidden_1TH, rope, arguments["attention_batch"], self.connection)
            if run is None:
                layer = decoder.layers[at]
                run = layer(hidden_1TH, attention_mask=None, position_embeddings=rope, **arguments), at + 1
            hidden_1TH, at = run
        logits: torch.Tensor = self.model.lm_head(decoder.norm(hidden_1TH[0, logits_rows]))  # type: ignore[operator]
        return logits.float()


def load_skeleton(source: Checkpoint | str | Path, *, dtype: torch.dtype, device: torch.device) -> ModelSkeleton:
    """The skeleton of a checkpoint, or of the one in a directory.

    Raises CheckpointError where the family cannot be served, or a file or tensor is missing or does not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    raw_config = checkpoint.config()
    config = model_config(checkpoint)
    model = _load_model(checkpoint, config, raw_config, dtype).to(device)
    latent: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in latent:
        # The cache keeps latents and the attention function works on them.
        module.latent_projections = LatentProjections(module)
        module.expand_kv = lambda latents, k_rope: (latents, k_rope)
    team = ThreadTeam(torch.get_num_threads()) if device.type == "cpu" else None
    if team is not None:
        pack_linears(model, team)
        compile_norms(model)
        compile_mlps(model, team)
        _compile_layers(model, team)
    return ModelSkeleton(
        model,
        gates=_gates(model, raw_config),
        kv_layout=_kv_layout(config, latent=bool(latent), dtype=dtype, device=device),
        eos_token_ids=_eos_token_ids(checkpoint.directory, config),
        team=team,
    )


def _load_model(
    checkpoint: Checkpoint, config: PretrainedConfig, raw_config: Mapping[str, Any], dtype: torch.dtype
) -> nn.Module:
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not family._supports_attention_backend:
        raise CheckpointError(f"{checkpoint.directory}: {family.__name__} cannot use our attention function")
    connection = RouterConnection(last_layer=config.num_hidden_layers - 1)
    has_gate = gate_spec_from_config(raw_config) is not None

    def init(self: nn.Module, config: PretrainedConfig) -> None:
        family.__init__(self, config)
        self.router_connection = connection  # type: ignore[assignment]
        _take_experts_out(self, connection, has_gate)

    # Same name and module as the family's class: transformers looks its renames up by them.
    skeleton_class = type(family.__name__, (family,), {"__init__": init, "__module__": family.__module__})
    block = (raw_config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    tensors = {
        name: _LazyTensor(checkpoint, name, block) for name in checkpoint.files if not name.endswith("_scale_inv")
    }
    try:
        with _quiet_transformers():
            model, info = skeleton_class.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation=attention.NAME,
                experts_implementation=moe_block.NAME,
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except RuntimeError as error:  # mis-shaped tensors and conversions that fail
        raise CheckpointError(f"{checkpoint.directory}: tensors do not fit config.json: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.directory}: {len(missing)} tensors are in none of its files, "
            f"among them {', '.join(missing[:4])}; the download is incomplete or config.json is another model's"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _take_experts_out(model: nn.Module, connection: RouterConnection, has_gate: bool) -> None:
    for name, module in list(model.named_modules()):
        if not moe_block.is_experts_module(module):
            continue
        layer = re.search(r"\.(\d+)\.", name)
        if layer is None or getattr(module, "has_post_expert_norm", False):
            raise CheckpointError(f"{type(model).__name__}: experts of the form {type(module).__name__} are not served")
        parent_name, _, _ = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if has_gate and MoeBlock.fits(parent):
            model.set_submodule(parent_name, MoeBlock(int(layer[1]), parent, connection))
        else:
            moe_block.empty_experts(module, int(layer[1]), connection)
    kept = [name for name, _ in model.named_parameters() if ".experts." in name]
    if kept:
        raise CheckpointError(f"{type(model).__name__}: experts like {kept[0]} are not served")


class _LazyTensor:
    """A checkpoint's tensor that is read when transformers slices it; fp8 is widened on the way."""

    def __init__(self, checkpoint: Checkpoint, name: str, block: Sequence[int]) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._block = block

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._checkpoint.read(self._name)
        scale_name = self._name + "_scale_inv"
        if scale_name in self._checkpoint.files:
            tensor = _widen_fp8(tensor, self._checkpoint.read(scale_name), self._block)
        return tensor[index]


def _widen_fp8(weight_NK: torch.Tensor, scale: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """float32 weight of fp8 with one scale per block, edge blocks cut short (DeepSeek-V3's format)."""
    rows, columns = weight_NK.shape
    scale_NK = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight_NK.float() * scale_NK


def _compile_layers(model: nn.Module, team: ThreadTeam) -> None:
    """Put compiled layers in the place of those that they fit; what they are made of is compiled already."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            for kind in (GroupedQueryLayer, LatentLayer):
                if kind.fits(child):
                    setattr(module, name, kind(child, team))


def _gates(model: nn.Module, raw_config: Mapping[str, Any]) -> Mapping[int, Gate]:
    """Gates of the layers whose blocks we built; layer -> gate."""
    spec = gate_spec_from_config(raw_config)
    if spec is None:
        return {}
    return {
        block.layer: build_gate(spec, block.gate.weight, getattr(block.gate, "e_score_correction_bias", None))
        for block in model.modules()
        if isinstance(block, MoeBlock)
    }


def _kv_layout(config: Any, *, latent: bool, dtype: torch.dtype, device: torch.device) -> KVLayout:
    if latent:
        heads, key_dim, value_dim = 1, config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        key_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        value_dim = getattr(config, "v_head_dim", None) or key_dim
    return KVLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        device=device,
        latent=latent,
    )


def _eos_token_ids(directory: Path, config: Any) -> frozenset[int]:
    """From generation_config.json, which chat models keep up to date, else from config.json."""
    eos = config.eos_token_id
    generation = directory / "generation_config.json"
    if generation.exists():
        try:
            eos = json.loads(generation.read_bytes()).get("eos_token_id", eos)
        except ValueError as error:
            raise CheckpointError(f"{generation}: cannot be read as JSON: {error}") from error
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, Sequence) else [eos])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its report of expert tensors that it did not load, and without its progress bar."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
