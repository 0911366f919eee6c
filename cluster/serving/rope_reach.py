"""How far rotary embeddings reach before one sequence of a batch changes those of another."""

from __future__ import annotations

from typing import Any

from experts.errors import ConfigError


def rope_reach(config: Any) -> int:
    """Longest sequence, in tokens, that is embedded in a batch as it would be alone; config: a transformers config.

    transformers picks the frequencies of a whole batch by its longest position (`dynamic_rope_update` in
    modeling_rope_utils.py): `longrope` changes them past original_max_position_embeddings, `dynamic` past
    max_position_embeddings, where no sequence comes anyway.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set for all layers, or one for each kind of layer.
    sets = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    limits = [each["original_max_position_embeddings"] for each in sets if each.get("rope_type") == "longrope"]
    return min(int(limit) for limit in (config.max_position_embeddings, *limits))


def check_reach(max_model_len: int, reach: int) -> None:
    """Raises ConfigError where sequences may be longer than `reach`."""
    if max_model_len > reach:
        raise ConfigError(
            f"engine.max_model_len is {max_model_len}, the model has positions for {reach} "
            "(max_position_embeddings; with longrope, original_max_position_embeddings): lower it"
        )
