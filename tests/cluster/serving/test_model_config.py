from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.serving.model_config import model_config
from experts.errors import CheckpointError
from experts.weights.checkpoint import Checkpoint


def edit(checkpoint: Path, to: Path, **changes: Any) -> Path:
    """A copy with some keys of config.json changed."""
    copy = Path(shutil.copytree(checkpoint, to / "edited"))
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "wonder_moe"}, "wonder_moe"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "clip"}, "clip"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"layer_types": ["linear_attention", "full_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_cannot_be_served_is_refused(
    changes: dict[str, Any], words: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    edited = Checkpoint(edit(tiny_checkpoint("mixtral"), tmp_path, **changes))
    with pytest.raises(CheckpointError, match=words):
        model_config(edited)


def test_an_indexer_is_refused_by_its_key(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """DeepSeek-V3.2 has it by default: full attention would give other tokens."""
    edited = Checkpoint(edit(tiny_checkpoint("deepseek_v3"), tmp_path, model_type="deepseek_v32"))
    with pytest.raises(CheckpointError, match=r"config\.json: index_head_dim, index_n_heads, index_topk: .* indexer"):
        model_config(edited)
