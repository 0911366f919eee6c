"""`auto` limits: never more memory than sequences can use, never longer than memory or positions allow."""

import pytest
import torch

from cluster.config.mesh import EngineConfig
from cluster.engine_limits import engine_limits
from cluster.serving.kv_cache import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, key_dim=8, value_dim=8, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"max_num_seqs": 3}, (100, 3 * 100 * LAYOUT.bytes_per_token)),
        ({"max_num_seqs": 3, "max_model_len": 10}, (10, 3 * 10 * LAYOUT.bytes_per_token)),
        ({"kv_cache_memory": 40 * LAYOUT.bytes_per_token}, (40, 40 * LAYOUT.bytes_per_token)),
        ({"kv_cache_memory": 10**12}, (100, 10**12)),
        ({"kv_cache_memory": 5, "max_model_len": 7}, (7, 5)),
    ],
)
def test_limits(engine: dict[str, int], expected: tuple[int, int]) -> None:
    assert engine_limits(EngineConfig.model_validate(engine), LAYOUT, 100) == expected


def test_memory_of_this_machine_is_only_shared() -> None:
    length, memory = engine_limits(EngineConfig(max_num_seqs=1), LAYOUT, 2**50)
    assert length == memory // LAYOUT.bytes_per_token
    assert 0 < memory < 2**45
