"""Where a checkpoint keeps its experts, read off its tensors' names and shapes; no list of model families.

Three shapes of names are known, all under a module prefix that holds the layer's number:

    {prefix}experts.{e}.gate_proj.weight, up_proj, down_proj     DeepSeek, Qwen, OLMoE, GLM, Ernie, ... [I, H]
    {prefix}experts.{e}.w1.weight, w3, w2                        Mixtral, Phi, MiniMax
    {prefix}experts.{e}.linear.weight, linear_v, linear_1        Grok-1
    {prefix}experts.{e}.up_proj.weight, down_proj | wi, wo       plain experts: Nemotron-H, Switch
    {prefix}experts.gate_up_proj, down_proj                      all in one tensor, [E, 2I, H] or [E, H, 2I]
    {prefix}input_linear.weight, output_linear.weight            the same, Granite
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experts.errors import CheckpointError
from experts.ops.activations import ACTIVATIONS
from experts.spec import ExpertSpec
from experts.weights.checkpoint import Checkpoint

_PER_EXPERT = re.compile(
    r"(?P<prefix>.*?\.(?P<layer>\d+)\..*?experts\.(?:expert_)?)(?P<expert>\d+)\.(?P<name>\w+)\.weight"
)
_PER_EXPERT_PROJECTIONS = (
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("linear", "linear_v", "linear_1"),
    (None, "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    (None, "wi", "wo"),
)
_FUSED = re.compile(
    r"(?P<prefix>.*?\.(?P<layer>\d+)\..*?)(?P<name>experts\.gate_up_proj|experts\.up_proj|input_linear)(?P<suffix>\.weight)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projections:
    """Tensor names of an expert's projections behind the layer's prefix.

    gate: None where `up` holds both or where experts are plain
    weight, bias: what follows a projection's name
    """

    gate: str | None
    up: str
    down: str
    weight: str = ".weight"
    bias: str = ".bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """Where every expert of a checkpoint is.

    spec:              shape and arithmetic of the experts
    experts_per_layer: layer -> number of experts, of the layers that have any
    prefixes:          layer -> what precedes `{expert}.` or, fused, the projection's name
    projections:       names of the projections
    fused:             all experts of a layer are one tensor, expert first
    transposed:        fused tensors are [E, in, out]
    interleaved:       gate and up alternate, gate first (GPT-OSS)
    scale_block:       rows and columns that share a float8 scale (`weight_scale_inv`), None if not quantised
    """

    spec: ExpertSpec
    experts_per_layer: Mapping[int, int]
    prefixes: Mapping[int, str]
    projections: Projections
    fused: bool = False
    transposed: bool = False
    interleaved: bool = False
    scale_block: tuple[int, int] | None = None

    @property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return sum(self.experts_per_layer.values())


def describe_experts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> ExpertLayout:
    """The layout of a checkpoint's experts.

    config: its config.json. Used keys: `hidden_size` (or `d_model`), `hidden_act` (or its older names),
    `num_hidden_layers` (layers from there on are multi-token-prediction heads and are left out),
    `model_type`, `swiglu_limit`, `quantization_config`.

    Raises CheckpointError where there are no experts or where they are kept in a way that is not known.
    """
    config = {**config, **config.get("text_config", {})}
    scale_block = _scale_block(checkpoint, config)
    per_expert = [match for name in checkpoint.files if (match := _PER_EXPERT.fullmatch(name))]
    if per_expert:
        return _describe_per_expert(checkpoint, config, per_expert, scale_block)
    fused = [match for name in checkpoint.files if (match := _FUSED.fullmatch(name))]
    if fused:
        return _describe_fused(checkpoint, config, fused)
    raise CheckpointError(
        f"{checkpoint.directory}: no tensor is named like an expert's (for example "
        "model.layers.0.mlp.experts.0.up_proj.weight); this is not a "
        "Mixture-of-Experts checkpoint that can be read"
    )


def _describe_per_expert(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    matches: list[re.Match[str]],
    scale_block: tuple[int, int] | None,
) -> ExpertLayout:
    experts: dict[int, set[int]] = {}
    prefixes: dict[int, str] = {}
    for match in matches:
        layer = _layer(match, config)
        if layer is not None:
            experts.setdefault(layer, set()).add(int(match["expert"]))
            prefixes[layer] = match["prefix"]
    first = min(experts)
    some = min(experts[first])
    names = {match["name"] for match in matches if match["prefix"] == prefixes[first]}
    for gate, up, down in _PER_EXPERT_PROJECTIONS:
        if {up, down, gate or up} == names:
            break
    else:
        raise CheckpointError(
            f"{checkpoint.directory}: experts with projections {sorted(names)} are not known; known are "
            "gate_proj/up_proj/down_proj, w1/w3/w2, up_proj/down_proj and wi/wo"
        )
    for layer, present in experts.items():
        if present != set(range(len(present))):
            missing = min(set(range(max(present))) - present)
            raise CheckpointError(
                f"{checkpoint.directory}: layer {layer} has expert {max(present)} and no expert {missing} "
                f"(tensor {prefixes[layer]}{missing}.{up}.weight); the download is incomplete"
            )
    stem = f"{prefixes[first]}{some}."
    intermediate_size, hidden_size = checkpoint.shape(f"{stem}{up}.weight")
    _check_hidden_size(checkpoint, config, f"{stem}{up}.weight", hidden_size)
    return ExpertLayout(
        spec=_spec(config, hidden_size, intermediate_size, gate is not None, f"{stem}{up}.bias" in checkpoint),
        experts_per_layer={layer: len(experts[layer]) for layer in sorted(experts)},
        prefixes=prefixes,
        projections=Projections(gate=gate, up=up, down=down),
        scale_block=scale_block,
    )


def _describe_fused(checkpoint: Checkpoint, config: Mapping[str, Any], matches: list[re.Match[str]]) -> ExpertLayout:
    by_layer = {layer: match for match in matches if (layer := _layer(match, config)) is not None}
    prefixes = {layer: match["prefix"] for layer, match in sorted(by_layer.items())}
    first = by_layer[min(by_layer)]
    up, weight = first["name"], first["suffix"] or ""
    down = {"input_linear": "output_linear"}.get(up, "experts.down_proj")
    up_name, down_name = first.group(), f"{first['prefix']}{down}{weight}"
    up_shape, down_shape = checkpoint.shape(up_name), checkpoint.shape(down_name)
    factor = 1 if up.endswith("experts.up_proj") else 2
    hidden_size = _hidden_size(config)
    if len(up_shape) == len(down_shape) == 3:
        for transposed in (False, True):
            (rows, columns), (out, inner) = up_shape[1:], down_shape[1:]
            if transposed:
                rows, columns, out, inner = columns, rows, inner, out
            if rows == factor * inner and columns == out == (hidden_size or columns):
                break
        else:
            raise CheckpointError(
                f"{checkpoint.path(up_name)}: tensors {up_name!r} {list(up_shape)} and {down_name!r} "
                f"{list(down_shape)} do not fit one another and hidden size {hidden_size}"
            )
    else:
        raise CheckpointError(
            f"{checkpoint.path(up_name)}: tensor {up_name!r} of shape {list(up_shape)}: "
            "[experts, rows, columns] expected"
        )
    bias = f"{weight.removesuffix('.weight')}_bias" if not weight else ".bias"
    model_type = config.get("model_type")
    return ExpertLayout(
        spec=_spec(config, columns, inner, factor == 2, f"{first['prefix']}{up}{bias}" in checkpoint),
        experts_per_layer={layer: checkpoint.shape(by_layer[layer].group())[0] for layer in sorted(by_layer)},
        prefixes=prefixes,
        projections=Projections(gate=None, up=up, down=down, weight=weight, bias=bias),
        fused=True,
        transposed=transposed,
        interleaved=model_type == "gpt_oss",
    )


def _layer(match: re.Match[str], config: Mapping[str, Any]) -> int | None:
    """The model's index of a layer; decoder layers follow the encoder's. None for prediction heads."""
    layer = int(match["layer"])
    if match["prefix"].startswith("decoder."):
        return layer + int(config["num_layers"])
    if match["prefix"].startswith("encoder."):
        return layer
    return layer if layer < int(config.get("num_hidden_layers", layer + 1)) else None


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    size: int | None = config.get("hidden_size", config.get("d_model"))
    return size


def _check_hidden_size(checkpoint: Checkpoint, config: Mapping[str, Any], name: str, hidden_size: int) -> None:
    if _hidden_size(config) not in (None, hidden_size):
        raise CheckpointError(
            f"{checkpoint.path(name)}: tensor {name!r} has {hidden_size} columns, but config.json says "
            f"hidden_size {_hidden_size(config)}; they belong to different models"
        )


def _spec(config: Mapping[str, Any], hidden_size: int, intermediate_size: int, gated: bool, bias: bool) -> ExpertSpec:
    keys = ("hidden_act", "hidden_activation", "mlp_hidden_act", "dense_act_fn", "activation_function")
    activation = next((config[key] for key in keys if config.get(key)), "silu")
    limit, up_shift = None, 0.0
    if config.get("model_type") == "gpt_oss":
        # Its config says silu; what it computes is x * sigmoid(1.702 x), clamped, times up + 1.
        activation, limit, up_shift = "quick_gelu", float(config.get("swiglu_limit", 7.0)), 1.0
    if config.get("model_type") == "grok-1":
        activation = "gelu_tanh"  # its config has no key for it; what JAX calls gelu
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation {activation!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    return ExpertSpec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=activation,
        gated=gated,
        bias=bias,
        limit=limit,
        up_shift=up_shift,
    )


def _scale_block(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[int, int] | None:
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    if method != "fp8" or not block:
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: quantization_config with quant_method {method!r} and "
            f"weight_block_size {block} is not read; use an unquantised checkpoint or one with fp8 blocks"
        )
    rows, columns = block
    return int(rows), int(columns)
