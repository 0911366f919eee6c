"""What runs inside a group's actor: a call to the group, and a call to all groups of its node.

The actor may be of any kind, a Serve replica too: its class needs no method of ours. It has one thread for such tasks,
and a node's call waits in it for the node's other groups. So that none waits for each other in a circle, a node's call
goes to its lowest group, which waits for higher ones only.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError

from experts.errors import ExpertNotResident, RequestError
from experts.node_call import NodeShare
from experts.spec import ExpertCall
from router_service.combine import Combiner
from router_service.placement import GroupReplica
from router_service.slot_index import IntArray
from router_service.transport.base import TransportError
from router_service.transport.ray_actors import RayActors

# Smaller arrays travel inside the task, as Ray itself does it.
_OBJECT_BYTES = 100 * 1024
# A sibling that hangs must not keep our thread: an async actor with a few calls in its queue answers nothing else, and
# Serve would take it for dead after 30 s.
_SIBLING_TIMEOUT_S = 20.0

# What crosses: a tensor's bytes and how to read them, for dtypes that numpy does not have.
Packed = tuple[npt.NDArray[np.uint8], str, tuple[int, ...]]


class Forwards(Protocol):
    """The one thing asked of a group here."""

    def forward(self, call: ExpertCall) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A call's failure as a value: Ray would wrap an exception, and the caller needs to tell the kinds apart."""

    kind: Literal["transport", "not resident", "request"]
    message: str
    field: str | None = None

    def error(self) -> TransportError | RequestError:
        """The failure as the exception that the caller raises."""
        if self.kind == "transport":
            return TransportError(self.message)
        return (ExpertNotResident if self.kind == "not resident" else RequestError)(self.message, self.field)


Outcome = npt.NDArray[np.float32] | Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class RayShare:
    """What one replica does with a call's hidden states; arrays as the tensors of `NodeShare`."""

    replica: str
    actor: str
    tokens_T: IntArray | None
    expert_ids_S: IntArray
    offsets_S1: IntArray
    token_rows_R: IntArray
    weights_R: npt.NDArray[np.float32]

    @classmethod
    def of(cls, replica: GroupReplica, share: NodeShare | ExpertCall) -> RayShare:
        """`share` as it travels to `replica`; a call of its own needs all of its tokens."""
        tokens_T = share.tokens_T if isinstance(share, NodeShare) else None
        return cls(
            replica=replica.replica,
            actor=replica.actor,
            tokens_T=None if tokens_T is None else tokens_T.numpy(),
            expert_ids_S=share.expert_ids_S.numpy(),
            offsets_S1=share.offsets_S1.numpy(),
            token_rows_R=share.token_rows_R.numpy(),
            weights_R=share.weights_R.numpy(),
        )

    def call(self, layer: int, hidden_TH: torch.Tensor) -> ExpertCall:
        """The share as a call to the group."""
        if self.tokens_T is not None:
            hidden_TH = hidden_TH.index_select(0, tensor(self.tokens_T))
        return ExpertCall(
            layer=layer,
            hidden_TH=hidden_TH,
            expert_ids_S=tensor(self.expert_ids_S),
            offsets_S1=tensor(self.offsets_S1),
            token_rows_R=tensor(self.token_rows_R),
            weights_R=tensor(self.weights_R),
        )


_groups: dict[str, Forwards] = {}


def serve_calls(replica: str, group: Forwards) -> None:
    """Let routers reach `group` under `replica` in this actor's process."""
    _groups[replica] = group


def forward(_actor: object, layer: int, hidden: Packed, share: RayShare) -> Outcome:
    """`partial_TH` of one replica, rows as the share's tokens."""
    group = _groups.get(share.replica)
    if group is None:
        return Refusal(kind="transport", message=f"replica {share.replica} does not live in this actor (any more)")
    try:
        return group.forward(share.call(layer, _unpack(hidden))).cpu().numpy()
    except ExpertNotResident as error:
        return Refusal(kind="not resident", message=str(error), field=error.field)
    except RequestError as error:
        return Refusal(kind="request", message=str(error), field=error.field)


def forward_node(actor: object, namespace: str, layer: int, hidden: Packed, shares: Sequence[RayShare]) -> Outcome:
    """The float32 sum of the partials of `shares`, whose first is this actor's and whose others live on its node.

    The others read the hidden states from the node's object store, and leave their partials there.
    """
    own, *others = shares
    actors = _siblings(namespace)
    given = ray.put(hidden) if others and hidden[0].nbytes >= _OBJECT_BYTES else hidden
    try:
        sent = [actors.run(each.replica, each.actor, forward, layer, given, each) for each in others]
    except TransportError as error:
        return Refusal(kind="transport", message=str(error))
    num_tokens, hidden_size = hidden[2]
    combiner = Combiner(num_tokens, hidden_size, torch.device("cpu"))
    own_outcome = forward(actor, layer, hidden, own)
    for share, reply in zip(shares, (None, *sent), strict=True):
        outcome = own_outcome if reply is None else _answer(actors, share, reply)
        if isinstance(outcome, Refusal):
            return outcome
        combiner.add(None if share.tokens_T is None else share.tokens_T.copy(), tensor(outcome))
    return combiner.result(torch.float32).numpy()


def pack(hidden_TH: torch.Tensor) -> Packed:
    """Hidden states of any dtype as they cross."""
    flat = hidden_TH.detach().cpu().contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy()
    return data, str(hidden_TH.dtype).removeprefix("torch."), tuple(hidden_TH.shape)


def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Without a copy where the array may be written; Ray's shared memory may not, and torch insists."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _unpack(hidden: Packed) -> torch.Tensor:
    data, dtype, shape = hidden
    return tensor(data).view(getattr(torch, dtype)).view(shape)


def _answer(actors: RayActors, share: RayShare, reply: Future[Outcome]) -> Outcome:
    where = f"{share.replica} in actor {share.actor} on this node"
    try:
        return reply.result(_SIBLING_TIMEOUT_S)
    except RayError as error:
        actors.forget(share.replica)
        return Refusal(kind="transport", message=f"{where}: {type(error).__name__}")
    except TimeoutError:
        return Refusal(kind="transport", message=f"{where}: no reply within {_SIBLING_TIMEOUT_S:g} s")


@cache
def _siblings(namespace: str) -> RayActors:
    return RayActors(namespace)
