"""What mesh.yaml asks of the gates, seen from outside: how many tokens each expert got of a prompt."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config.load import load_mesh
from cluster.engine_host import EngineHost
from experts.errors import ConfigError

# Of two layers; the last one computes only the token whose logits are wanted. 4 experts, 2 for a token.
LAYERS, TOKENS = 2, 40


def _shares(serve_here: Callable[[dict[str, Any]], str], source: Path, **router: Any) -> tuple[list[int], int, int]:
    """Of a prompt: tokens of every expert, choices that were dropped, and that were rerouted."""
    document = {"model": {"source": str(source), "served_name": "tiny"}, "experts": {"groups": 2}, "router": router}
    url = serve_here(document)
    body = {"model": "tiny", "prompt": list(range(TOKENS)), "max_tokens": 1, "temperature": 0}
    httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
    metrics = httpx.get(f"{url}/metrics").text

    def values(pattern: str) -> list[int]:
        return [int(float(value)) for value in re.findall(rf"^{pattern} (\S+)$", metrics, re.MULTILINE)]

    tokens = values(r'expert_tokens_total\{.*layer="[01]".*\}')
    (dropped,) = values(r'expert_capacity_overflow_total\{.*outcome="dropped".*\}') or [0]
    (rerouted,) = values(r'expert_capacity_overflow_total\{.*outcome="rerouted".*\}') or [0]
    return tokens, dropped, rerouted


@pytest.mark.parametrize("transport", ["in_process", "grpc"])
def test_a_capacity_takes_effect(
    transport: str, tiny_checkpoint: Callable[[str], Path], serve_here: Callable[[dict[str, Any]], str]
) -> None:
    source, choices = tiny_checkpoint("mixtral"), LAYERS * TOKENS * 2
    tokens, *outcomes = _shares(serve_here, source, transport=transport)
    assert (sum(tokens), outcomes) == (choices, [0, 0])
    assert max(tokens) > 24

    # ceil(40 * 2 / 4 * 1.2)
    tokens, dropped, rerouted = _shares(serve_here, source, transport=transport, capacity_factor=1.2)
    assert max(tokens) == 24
    assert sum(tokens) == choices - dropped
    assert (dropped > 0, rerouted) == (True, 0)

    asked = {"transport": transport, "capacity_factor": 1.2, "overflow": "next_best"}
    tokens, dropped, rerouted = _shares(serve_here, source, **asked)
    assert max(tokens) == 24
    assert sum(tokens) == choices - dropped
    assert rerouted > 0


def test_an_engine_does_not_start_with_what_its_gates_cannot_do(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(
        f"model: {{source: {tiny_checkpoint('olmoe')}}}\nrouter: {{transport: in_process, capacity_factor: 1}}\n"
    )
    host = EngineHost(config=load_mesh(mesh), controller=None, transport=None)
    with pytest.raises(ConfigError, match=r"router\.capacity_factor"):
        asyncio.run(host.start())
