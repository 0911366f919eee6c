"""MoE blocks without experts: transformers' modules around ours, the router where the experts were.

Two ways. Where the router has the family's gate, the whole block is a `MoeBlock`: hidden states go to the router
before anything else, the shared expert runs while they are out. Otherwise the family's own block stays, gate and all;
only its experts module is emptied and calls `router.dispatch` through transformers' ExpertsInterface.

Of the last layer's tokens only those get their experts whose logits are wanted: of a prompt, the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "expertmesh"

# Rows of a step whose results the last layer has to give; None: all. A thread's own, as micro-batches have threads.
_WANTED: ContextVar[torch.Tensor | None] = ContextVar("wanted rows of the last layer", default=None)


@contextmanager
def wanting_only(rows_R: torch.Tensor) -> Iterator[None]:
    """Until it ends, nobody reads what the last layer makes of other rows than these of a step."""
    token = _WANTED.set(rows_R)
    try:
        yield
    finally:
        _WANTED.reset(token)


class Pending(Protocol):
    """Expert work that is out."""

    def result(self) -> torch.Tensor:
        """combined_TH, in the dtype of the hidden states sent."""
        ...

    def cancel(self) -> None:
        """Nobody wants the result any more."""
        ...


class ExpertRouter(Protocol):
    """What a MoE block needs of `router_service.router.Router`."""

    def route(self, layer: int, hidden_TH: torch.Tensor) -> Pending: ...

    def dispatch(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Pending: ...


def _nothing() -> None:
    """What there is to do while experts are out, where there is no other micro-batch."""


@dataclass(kw_only=True, slots=True)
class RouterConnection:
    """The router that all blocks of a model share, and the seconds that they spent on it.

    last_layer: after which nothing looks from one row at another
    meanwhile: called while experts are out and nothing is left to do for these tokens
    num_threads: torch's in this step; one while experts are out, which may be on the cores of the others, and OpenMP
               waits for all of its threads
    send_s:    gate, plan and handing over;  wait_s: from there to the answer, shared expert and `meanwhile` not counted
    """

    router: ExpertRouter | None = None
    last_layer: int | None = None
    meanwhile: Callable[[], None] = _nothing
    num_threads: int = 1
    send_s: float = 0.0
    wait_s: float = 0.0

    @property
    def overlaps(self) -> bool:
        """Whether another micro-batch is to be computed while experts are out."""
        return self.meanwhile is not _nothing

    def of_wanted_rows(
        self, layer: int, compute: Callable[..., torch.Tensor], hidden_TH: torch.Tensor, *others: torch.Tensor
    ) -> torch.Tensor:
        """`compute(hidden_TH, *others)`, [T, H], with zeros in the rows of the last layer that nobody reads."""
        rows_R = _WANTED.get() if layer == self.last_layer else None
        if rows_R is None or len(rows_R) == len(hidden_TH):
            return compute(hidden_TH, *others)
        out_TH = torch.zeros_like(hidden_TH)
        if len(rows_R):
            out_TH[rows_R] = compute(*(each[rows_R] for each in (hidden_TH, *others)))
        return out_TH

    def send(
        self, layer: int, hidden_TH: torch.Tensor, choice: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Pending:
        """`choice`: expert ids and weights where the caller's own gate chose."""
        assert self.router is not None, "ModelSkeleton.connect() comes before the first step"
        started = time.perf_counter()
        if self.num_threads > 1:
            torch.set_num_threads(1)
        if choice is None:
            pending = self.router.route(layer, hidden_TH)
        else:
            pending = self.router.dispatch(layer, hidden_TH, *choice)
        self.send_s += time.perf_counter() - started
        return pending

    def receive(self, pending: Pending) -> torch.Tensor:
        try:
            self.meanwhile()
        except BaseException:
            pending.cancel()
            raise
        started = time.perf_counter()
        combined_TH = pending.result()
        if self.num_threads > 1:
            torch.set_num_threads(self.num_threads)
        self.wait_s += time.perf_counter() - started
        return combined_TH


class MoeBlock(nn.Module):
    """`experts(x) + shared_experts(x)`, experts behind the router.

    `gate` and `shared_experts` are the family's own modules under its own names, so that the checkpoint loads as
    ever; the gate's weights go to the router, its forward is not called.
    """

    def __init__(self, layer: int, block: nn.Module, connection: RouterConnection) -> None:
        super().__init__()
        self.layer = layer
        self.gate: Any = block.get_submodule("gate")
        self.shared_experts: nn.Module | None = getattr(block, "shared_experts", None)
        self._connection = connection

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a family's block is made of these parts and nothing else."""
        names = {name for name, _ in block.named_children()}
        return {"gate", "experts"} <= names <= {"gate", "experts", "shared_experts"}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., H], same shape back."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        return self._connection.of_wanted_rows(self.layer, self._forward, hidden_TH).view(hidden.shape)

    def _forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        pending = self._connection.send(self.layer, hidden_TH)
        try:
            shared_TH = None if self.shared_experts is None else self.shared_experts(hidden_TH)
        except BaseException:
            pending.cancel()
            raise
        combined_TH = self._connection.receive(pending)
        return combined_TH if shared_TH is None else combined_TH + shared_TH


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers can put another implementation in this module's place (its ExpertsInterface)."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def empty_experts(module: nn.Module, layer: int, connection: RouterConnection) -> None:
    """Take the weights out of a family's experts module and let its forward reach the router."""
    for name in list(module._parameters):
        module._parameters[name] = None
    module._is_hf_initialized = True  # type: ignore[assignment]  # nothing is left for transformers to initialise
    module.expertmesh = (layer, connection)  # type: ignore[assignment]


def _dispatch_experts(
    module: nn.Module, hidden: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    layer, connection = module.expertmesh  # type: ignore[misc]
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])

    def compute(hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return connection.receive(connection.send(layer, hidden_TH, (expert_ids_TK, weights_TK)))  # type: ignore[no-any-return]

    combined_TH: torch.Tensor = connection.of_wanted_rows(layer, compute, hidden_TH, expert_ids_TK, weights_TK.float())
    return combined_TH.view(hidden.shape)


ALL_EXPERTS_FUNCTIONS.register(NAME, _dispatch_experts)
