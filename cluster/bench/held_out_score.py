"""Bits per byte of held-out text, of a model as it is served and of variants of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.nn import functional as F

from cluster.bench.held_out import held_out_texts
from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.skeleton import ModelSkeleton
from cluster.serving.tokenizer import Tokenizer
from router_service.router import Router


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """The beginning of a text. num_bytes: UTF-8 bytes of all tokens but the first, which nothing predicts."""

    ids_T: torch.Tensor
    num_bytes: int


class HeldOutScore:
    """Scores `skeleton` with any router beside itself with `plain`.

    console: where progress goes
    num_tokens, num_bytes, bits_per_byte: of the excerpts, with `plain`
    """

    def __init__(self, skeleton: ModelSkeleton, excerpts: Sequence[Excerpt], plain: Router, console: Console) -> None:
        self._skeleton = skeleton
        self._excerpts = excerpts
        self._console = console
        self._logits = list(self._run(plain, "float32"))
        self._bits = list(map(_bits, self._logits, excerpts))
        self._norm = math.sqrt(sum(float(logits_TV.square().sum()) for logits_TV in self._logits))
        self.num_tokens = sum(len(excerpt.ids_T) - 1 for excerpt in excerpts)
        self.num_bytes = sum(excerpt.num_bytes for excerpt in excerpts)
        self.bits_per_byte = sum(self._bits) / self.num_bytes

    def compare(self, router: Router, name: str) -> dict[str, float | None]:
        """bits_per_byte, shift (of that, against plain), shift_error (its standard error over the texts; None for one
        text), relative_error (norm of the difference of all logits to the plain ones, over the latter's norm).
        """
        shifts: list[float] = []
        difference = 0.0
        for index, logits_TV in enumerate(self._run(router, name)):
            shifts.append(_bits(logits_TV, self._excerpts[index]) - self._bits[index])
            difference += float((logits_TV - self._logits[index]).square().sum())
        return {
            "bits_per_byte": self.bits_per_byte + sum(shifts) / self.num_bytes,
            "shift": sum(shifts) / self.num_bytes,
            "shift_error": _error_of_sum(shifts, self.num_bytes),
            "relative_error": math.sqrt(difference) / self._norm,
        }

    def _run(self, router: Router, name: str) -> Iterator[torch.Tensor]:
        self._skeleton.connect(router)
        for index, excerpt in enumerate(self._excerpts):
            self._console.print(f"{name}: text {index + 1} of {len(self._excerpts)}", highlight=False)
            yield logits_of(self._skeleton, excerpt.ids_T[:-1])


def excerpts_of(tokenizer: Tokenizer, *, tokens: int, context: int) -> list[Excerpt]:
    """Beginnings of held-out files, `context` tokens of each at most, `tokens` in all at most."""
    excerpts: list[Excerpt] = []
    for text in held_out_texts():
        ids = tokenizer.encode(text, add_special_tokens=True)[: min(tokens, context) + 1]
        if len(ids) > 1:
            num_bytes = sum(len(tokenizer.token_bytes(token_id)) for token_id in ids[1:])
            excerpts.append(Excerpt(ids_T=torch.tensor(ids), num_bytes=num_bytes))
            tokens -= len(ids) - 1
        if tokens <= 0:
            break
    return excerpts


@torch.inference_mode()
def logits_of(skeleton: ModelSkeleton, ids_T: torch.Tensor) -> torch.Tensor:
    """float32 [T, vocabulary], all of a text in one step."""
    num_tokens = len(ids_T)
    memory = num_tokens * skeleton.kv_layout.bytes_per_token
    cache = KVCache(skeleton.kv_layout, memory=memory, max_num_seqs=1, max_model_len=num_tokens)
    slot = cache.allocate(num_tokens)
    assert slot is not None
    batch = AttentionBatch([Chunk(slot=slot, num_tokens=num_tokens)], skeleton.device)
    positions_T = torch.arange(num_tokens)
    return skeleton.forward(ids_T, positions_T, batch, positions_T)


def _bits(logits_TV: torch.Tensor, excerpt: Excerpt) -> float:
    return float(F.cross_entropy(logits_TV, excerpt.ids_T[1:], reduction="sum")) / math.log(2)


def _error_of_sum(values: Sequence[float], unit: float) -> float | None:
    """Standard error of `sum(values) / unit`, values being independent."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) * math.sqrt(len(values)) / unit
