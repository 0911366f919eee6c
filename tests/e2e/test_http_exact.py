"""Greedy tokens over HTTP are the tokens of transformers' `generate`, whatever the transport and the groups."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

SPECIAL = {256: "<|bos|>", 257: "<|eos|>", 258: "<|user|>", 259: "<|assistant|>"}
LENGTHS = (1, 2, 47, 48, 49, 200, 700)
NEW_TOKENS = 10


def _prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def _name(token_id: int) -> str:
    """How /v1/completions names a token of the tiny checkpoints: id below 256 is that byte."""
    if token_id >= 256:
        return SPECIAL.get(token_id, "")
    return chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"


@cache
def _generate(checkpoint: Path, prompt: tuple[int, ...]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [_name(token) for token in output[0, len(prompt) :].tolist()]


def _complete(url: str, prompt: list[int]) -> list[str]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    tokens: list[str] = response.json()["choices"][0]["logprobs"]["tokens"]
    return tokens


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
) -> None:
    checkpoint = tiny_checkpoint(family)
    url = serve_here(_document(checkpoint, groups, transport))
    for length in LENGTHS:
        prompt = _prompt(length)
        assert _complete(url, prompt) == _generate(checkpoint, tuple(prompt)), f"prompt of {length} tokens"
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    (combined,) = (line for line in metrics if line.startswith("expert_dispatch_latency_seconds_count"))
    assert float(combined.split()[-1]) >= len(LENGTHS) * NEW_TOKENS, "a batch of each layer and step"


@pytest.mark.parametrize("overlap", [False, True])
def test_sixteen_at_once_give_what_each_gives_alone(
    overlap: bool, tiny_checkpoint: Callable[[str], Path], serve_here: Callable[[dict[str, Any]], str]
) -> None:
    checkpoint = tiny_checkpoint("deepseek_v3")
    document = _document(checkpoint, 4, "grpc")
    document["engine"] |= {
        "enable_dbo": overlap,
        "dbo_decode_token_threshold": 2,
        "dbo_prefill_token_threshold": 2,
    }
    url = serve_here(document)
    prompts = [_prompt(1 + 23 * index, seed=1) for index in range(16)]
    alone = [_complete(url, prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: _complete(url, prompt), prompts))
    assert together == alone
    assert alone[5] == _generate(checkpoint, tuple(prompts[5]))
