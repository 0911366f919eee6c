"""config.json as transformers understands it, and what of it we do not serve."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import cluster.serving.grok_1  # noqa: F401  (registers with transformers)
from experts.errors import CheckpointError
from experts.weights.checkpoint import Checkpoint

# Families that are another one under their own name.
_ALIASES = {"kimi_k2": "deepseek_v3"}
# Quantised checkpoints whose non-expert weights we can read: plain, or fp8 with block scales.
_READABLE_QUANTIZATION = ("fp8", "mxfp4")
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def model_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """A checkpoint's config as transformers' own class.

    Raises CheckpointError, which names the key, for what we do not serve.
    """
    raw = checkpoint.config()
    where = checkpoint.directory / "config.json"
    model_type = raw.get("model_type")
    family = _ALIASES.get(str(model_type), model_type)
    if family not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not a model of the installed transformers; "
            "code that comes with a checkpoint is not run"
        )
    quantization = raw.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if quantization and method not in _READABLE_QUANTIZATION:
        raise CheckpointError(
            f"{where}: quantization_config.quant_method {method!r} is not read; "
            f"use an unquantised checkpoint or one of {', '.join(_READABLE_QUANTIZATION)}"
        )
    try:
        plain = {key: value for key, value in raw.items() if key != "quantization_config"}
        config = CONFIG_MAPPING[family].from_dict(plain | {"model_type": family})
    except Exception as error:  # a config class raises whatever its validation likes
        raise CheckpointError(f"{where}: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{where}: model_type {model_type!r} has no causal language model in transformers")
    indexer = sorted(key for key in config.to_dict() if key.startswith(("index_", "indexer_")))
    if indexer:
        raise CheckpointError(
            f"{where}: {', '.join(indexer)}: attention over the tokens that an indexer picks (sparse attention) is not "
            "served; use a model with full attention, such as deepseek_v3"
        )
    layer_types = set(getattr(config, "layer_types", None) or _ATTENTION_TYPES)
    if not layer_types <= _ATTENTION_TYPES:
        raise CheckpointError(
            f"{where}: layer_types {', '.join(sorted(layer_types - _ATTENTION_TYPES))} are not served, "
            f"only {' and '.join(sorted(_ATTENTION_TYPES))}"
        )
    return config
