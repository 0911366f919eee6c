"""Greedy tokens over HTTP are the tokens of transformers' `generate`, whatever the transport and the groups.

The Ray transport is in test_ray_serve.py: it needs a Ray that runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest


def _document(checkpoint: Path, groups: int, transport: str) -> dict[str, Any]:
    return {
        "model": {"source": str(checkpoint), "served_name": "tiny"},
        "experts": {"groups": groups},
        "router": {"transport": transport},
        # Chunks of 48: longer prompts are split, and mixed with other sequences' decoding.
        "engine": {"max_num_seqs": 16, "max_num_batched_tokens": 48},
    }


@pytest.mark.parametrize(
    ("family", "groups", "transport"),
    [
        ("deepseek_v3", 1, "grpc"),
        ("deepseek_v3", 2, "grpc"),
        ("deepseek_v3", 4, "grpc"),
        ("deepseek_v3", 1, "in_process"),
        ("deepseek_v3", 2, "in_process"),
        ("deepseek_v3", 4, "in_process"),
        ("deepseek_v2", 2, "grpc"),
        ("mixtral", 2, "grpc"),
        ("qwen3_moe", 4, "grpc"),
        ("olmoe", 2, "grpc"),
    ],
)
def test_tokens_equal_generate(
    family: str,
    groups: int,
    transport: str,
    tiny_checkpoint: Callable[[str], Path],
    serve_here: Callable[[dict[str, Any]], str],
    check_exact: Callable[[str, str, Path], None],
) -> None:
    checkpoint = tiny_checkpoint(family)
    url = serve_here(_document(checkpoint, groups, transport))
    check_exact(url, "tiny", checkpoint)
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    (combined,) = (line for line in metrics if line.startswith("expert_dispatch_latency_seconds_count"))
    assert float(combined.split()[-1]) >= 70, "7 prompts, 10 tokens each: a batch of each layer and step"


def test_experts_in_several_groups_change_no_token(
    tiny_checkpoint: Callable[[str], Path],
    serve_here: Callable[[dict[str, Any]], str],
    check_exact: Callable[[str, str, Path], None],
) -> None:
    checkpoint = tiny_checkpoint("deepseek_v3")
    document = _document(checkpoint, 4, "grpc")
    document["experts"]["num_redundant_experts"] = 8
    document["router"]["max_nodes_per_token"] = 1
    check_exact(serve_here(document), "tiny", checkpoint)


@pytest.mark.parametrize(
    ("groups", "transport", "overlap"),
    [
        (1, "grpc", False),
        (2, "grpc", False),
        (4, "grpc", False),
        (1, "grpc", True),
        (2, "grpc", True),
        (4, "grpc", True),
        (1, "in_process", False),
        (2, "in_process", False),
        (4, "in_process", False),
    ],
)
def test_sixteen_at_once_give_what_each_gives_alone(
    groups: int,
    transport: str,
    overlap: bool,
    tiny_checkpoint: Callable[[str], Path],
    serve_here: Callable[[dict[str, Any]], str],
    check_together: Callable[[str, str, Path], None],
) -> None:
    checkpoint = tiny_checkpoint("deepseek_v3")
    document = _document(checkpoint, groups, transport)
    document["engine"] |= {
        "enable_dbo": overlap,
        "dbo_decode_token_threshold": 2,
        "dbo_prefill_token_threshold": 2,
    }
    check_together(serve_here(document), "tiny", checkpoint)
