"""What the demo model is judged by: held-out bits per byte, and how evenly its experts are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """`balancedness`: mean over layers of (mean load / largest load) of the experts; 1.0 is even."""

    bits_per_byte: float
    balancedness: float


class LoadCounter:
    """Counts the tokens that each gate sends to each of its experts; a context manager over forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.gates: dict[str, Any] = {
            name: module for name, module in model.named_modules() if hasattr(module, "e_score_correction_bias")
        }
        self.loads: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LoadCounter:
        for name, gate in self.gates.items():
            self.loads[name] = torch.zeros(gate.num_experts)
            self._handles.append(gate.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def count(module: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            load = torch.bincount(outputs[2].flatten(), minlength=module.num_experts)
            self.loads[name] += load

        return count

    def take(self) -> dict[str, Tensor]:
        """The loads since the last call, one float32 [E] a gate."""
        taken = {name: load.clone() for name, load in self.loads.items()}
        for load in self.loads.values():
            load.zero_()
        return taken


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, texts: Sequence[str], *, window: int, max_bytes: float = math.inf
) -> Evaluation:
    """Scores `texts` (whole files, the first that fit `max_bytes`) in windows of `window` tokens.

    Bits per byte = negative log2 likelihood of all tokens but the leading BEGIN over the texts' UTF-8 bytes.
    """
    nats, num_bytes = 0.0, 0
    with LoadCounter(model) as counter:
        for text in texts:
            if num_bytes and num_bytes + len(text.encode()) > max_bytes:
                continue
            num_bytes += len(text.encode())
            ids = torch.tensor(tokenizer(text)["input_ids"])
            for start in range(0, len(ids) - 1, window):
                chunk = ids[start : start + window + 1]
                logits = model(input_ids=chunk[None, :-1], use_cache=False).logits[0].float()
                nats += float(nn.functional.cross_entropy(logits, chunk[1:], reduction="sum"))
        balances = [float(load.mean() / load.max()) for load in counter.take().values()]
    return Evaluation(bits_per_byte=nats / math.log(2) / num_bytes, balancedness=sum(balances) / len(balances))
