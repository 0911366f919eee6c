"""Calls as Ray actor tasks, tensors as objects: where groups share a node they read one copy of a batch.

A group's actor announces the group with `serve_calls`; the router finds the actor by name and runs
`_forward` in it. The actor may be of any kind, a Serve replica too: its class needs no method of ours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from experts.errors import ExpertNotResident, RequestError
from experts.node_call import NodeCall, NodeShare
from experts.spec import ExpertCall
from router_service.combine import Combiner
from router_service.placement import GroupReplica
from router_service.slot_index import IntArray
from router_service.transport.base import TransportError, relay_of

# Ray gives every actor this group with a thread of its own, so that a call does not hold up an async
# actor's loop.
_CONCURRENCY_GROUP = "_ray_system"
# How often a waiting reply looks whether its replica was dropped.
_LOOK_S = 0.25
# Smaller arrays travel inside the task, as Ray itself does it.
_OBJECT_BYTES = 100 * 1024

# What crosses: a tensor's bytes and how to read them, for dtypes that numpy does not have.
_Packed = tuple[npt.NDArray[np.uint8], str, tuple[int, ...]]
_Outcome = npt.NDArray[np.float32] | tuple[str, str, str | None]


class Forwards(Protocol):
    """The one thing asked of a group here."""

    def forward(self, call: ExpertCall) -> torch.Tensor: ...


_groups: dict[str, Forwards] = {}


def serve_calls(replica: str, group: Forwards) -> None:
    """Let routers reach `group` under `replica` in this actor's process."""
    _groups[replica] = group


def _forward(_actor: object, replica: str, layer: int, hidden: npt.NDArray[np.uint8], *rest: Any) -> _Outcome:
    """Runs inside the group's actor. Refusals come back as (kind, message, field): Ray would wrap an exception."""
    dtype, shape, tokens_T, experts_S, offsets_S1, rows_R, weights_R = rest
    group = _groups.get(replica)
    if group is None:
        return "transport", f"replica {replica} does not live in this actor (any more)", None
    share = NodeShare(
        group=0,
        address="",
        tokens_T=None if tokens_T is None else _tensor(tokens_T),
        expert_ids_S=_tensor(experts_S),
        offsets_S1=_tensor(offsets_S1),
        token_rows_R=_tensor(rows_R),
        weights_R=_tensor(weights_R),
    )
    hidden_TH = _tensor(hidden).view(getattr(torch, dtype)).view(shape)
    try:
        return group.forward(share.call(layer, hidden_TH)).cpu().numpy()
    except ExpertNotResident as error:
        return "not resident", str(error), error.field
    except RequestError as error:
        return "request", str(error), error.field


def _sum(_actor: object, num_tokens: int, tokens: list[IntArray | None], *outcomes: _Outcome) -> _Outcome:
    """Runs inside one of the node's actors: the sum of all partials, or the first refusal."""
    combiner: Combiner | None = None
    for tokens_T, outcome in zip(tokens, outcomes, strict=True):
        if not isinstance(outcome, np.ndarray):
            return outcome
        if combiner is None:
            combiner = Combiner(num_tokens, outcome.shape[1], torch.device("cpu"))
        combiner.add(None if tokens_T is None else tokens_T.copy(), _tensor(outcome))
    assert combiner is not None, "a node's call has shares"
    return combiner.result(torch.float32).numpy()


class _Reply:
    def __init__(self, transport: RayRefsTransport, replica: GroupReplica, ref: Any) -> None:
        self._transport = transport
        self._replica = replica
        self._ref = ref

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        where = f"{self._replica.replica} in actor {self._replica.actor}"
        while True:
            try:
                outcome: _Outcome = ray.get(self._ref, timeout=_LOOK_S)
                break
            except GetTimeoutError:
                if self._transport.forgot(self._replica):
                    raise TransportError(f"{where}: the replica left the placement table") from None
                if deadline is not None and time.monotonic() > deadline:
                    raise TransportError(f"{where}: no reply within the deadline") from None
            except RayTaskError as error:
                raise TransportError(f"{where}: the group failed: {error.cause}") from error
            except RayError as error:
                raise TransportError(f"{where}: {type(error).__name__}") from error
        if isinstance(outcome, np.ndarray):
            return _tensor(outcome)
        kind, message, field = outcome
        if kind == "transport":
            raise TransportError(message)
        raise (ExpertNotResident if kind == "not resident" else RequestError)(message, field)

    def cancel(self) -> None:
        """Ray cannot take back an actor's task that began; the answer is dropped."""


class RayRefsTransport:
    """Actors are looked up by `GroupReplica.actor` in `namespace`. Ray must be initialised. Thread-safe."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._lock = threading.Lock()
        self._actors: dict[str, Any] = {}
        self._closed = False

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> _Reply:
        hidden, dtype, shape = _pack(call.hidden_TH)
        rows = (call.expert_ids_S, call.offsets_S1, call.token_rows_R, call.weights_R)
        arrays = (None, *(each.numpy() for each in rows))
        run = self._run(replica)
        return _Reply(self, replica, run(_forward, replica.replica, call.layer, hidden, dtype, shape, *arrays))

    def send_node(self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None) -> _Reply:
        data, dtype, shape = _pack(call.hidden_TH)
        # As an object the batch crosses to the node once, whatever number of groups read it there.
        hidden = ray.put(data) if data.nbytes >= _OBJECT_BYTES else data
        tokens = [None if share.tokens_T is None else share.tokens_T.numpy() for share in call.shares]
        partials = []
        for replica, share, tokens_T in zip(replicas, call.shares, tokens, strict=True):
            rows = (share.expert_ids_S, share.offsets_S1, share.token_rows_R, share.weights_R)
            arrays = (tokens_T, *(each.numpy() for each in rows))
            run = self._run(replica)
            partials.append(run(_forward, replica.replica, call.layer, hidden, dtype, shape, *arrays))
        relay = relay_of(replicas, call)
        return _Reply(self, relay, self._run(relay)(_sum, len(call.hidden_TH), tokens, *partials))

    def forget(self, replica: GroupReplica) -> None:
        with self._lock:
            self._actors.pop(replica.replica, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._actors.clear()

    def forgot(self, replica: GroupReplica) -> bool:
        """The replica was dropped after it was called."""
        return replica.replica not in self._actors

    def _run(self, replica: GroupReplica) -> Any:
        """What starts a function of this module inside the replica's actor."""
        return self._actor(replica).__ray_call__.options(concurrency_group=_CONCURRENCY_GROUP).remote

    def _actor(self, replica: GroupReplica) -> Any:
        actor = self._actors.get(replica.replica)
        if actor is not None:
            return actor
        if self._closed:
            raise TransportError("the transport was closed")
        try:
            actor = ray.get_actor(replica.actor, namespace=self._namespace)
        except ValueError as error:
            raise TransportError(f"{replica.replica}: no actor {replica.actor!r} is alive in Ray") from error
        with self._lock:
            return self._actors.setdefault(replica.replica, actor)


def _pack(tensor: torch.Tensor) -> _Packed:
    flat = tensor.detach().cpu().contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy()
    return data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Without a copy where the array may be written; Ray's shared memory may not, and torch insists."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
