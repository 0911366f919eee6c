"""How long sequences may be and how much memory their keys and values may take, where mesh.yaml says `auto`."""

from __future__ import annotations

import os

import torch

from cluster.config.mesh import EngineConfig
from cluster.serving.kv_cache import KVLayout

# On a GPU the skeleton is loaded by now and activations need the rest; a CPU's memory is shared with expert groups.
_GPU_SHARE = 0.85
_CPU_SHARE = 0.25


def engine_limits(engine: EngineConfig, layout: KVLayout, max_position_embeddings: int) -> tuple[int, int]:
    """(max_model_len in tokens, kv_cache_memory in bytes).

    auto length: the model's positions, or what the memory holds of one sequence if that is less.
    auto memory: a share of what is free now, but never more than max_num_seqs sequences of full length can use.
    """
    fixed_length = None if engine.max_model_len == "auto" else int(engine.max_model_len)
    longest = fixed_length or max_position_embeddings
    if engine.kv_cache_memory == "auto":
        memory = min(_free_share(layout.device), engine.max_num_seqs * longest * layout.bytes_per_token)
    else:
        memory = int(engine.kv_cache_memory)
    return fixed_length or max(1, min(longest, memory // layout.bytes_per_token)), memory


def _free_share(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_SHARE)
