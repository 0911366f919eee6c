"""Calls as Ray actor tasks, tensors as objects: where groups share a node they read one copy of a batch.

A group's actor announces the group with `serve_calls`; the router finds the actor by name and runs
`_forward` in it. The actor may be of any kind, a Serve replica too: its class needs no method of ours.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from experts.errors import ExpertNotResident, RequestError
from experts.spec import ExpertCall
from router_service.placement import GroupReplica
from router_service.transport.base import TransportError

# Ray gives every actor this group with a thread of its own, so that a call does not hold up an async
# actor's loop.
_CONCURRENCY_GROUP = "_ray_system"
# How often a waiting reply looks whether its replica was dropped.
_LOOK_S = 0.25

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
    """Runs inside the group's actor. Refusals come back as (kind, message, field): Ray would wrap an
    exception."""
    dtype, shape, experts_S, offsets_S1, rows_R, weights_R = rest
    group = _groups.get(replica)
    if group is None:
        return "transport", f"replica {replica} does not live in this actor (any more)", None
    call = ExpertCall(
        layer=layer,
        hidden_TH=_unpack((hidden, dtype, shape)),
        expert_ids_S=_tensor(experts_S),
        offsets_S1=_tensor(offsets_S1),
        token_rows_R=_tensor(rows_R),
        weights_R=_tensor(weights_R),
    )
    try:
        return group.forward(call).cpu().numpy()
    except ExpertNotResident as error:
        return "not resident", str(error), error.field
    except RequestError as error:
        return "request", str(error), error.field


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


class RayRefsTransport:
    """Actors are looked up by `GroupReplica.actor` in `namespace`. Ray must be initialised. Thread-safe."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._lock = threading.Lock()
        self._actors: dict[str, Any] = {}
        self._closed = False

    def send(self, replica: GroupReplica, call: ExpertCall) -> _Reply:
        hidden, dtype, shape = _pack(call.hidden_TH)
        arrays = (call.expert_ids_S, call.offsets_S1, call.token_rows_R, call.weights_R)
        ref = (
            self._actor(replica)
            .__ray_call__.options(concurrency_group=_CONCURRENCY_GROUP)
            .remote(
                _forward,
                replica.replica,
                call.layer,
                hidden,
                dtype,
                shape,
                *(each.numpy() for each in arrays),
            )
        )
        return _Reply(self, replica, ref)

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


def _unpack(packed: _Packed) -> torch.Tensor:
    data, dtype, shape = packed
    return _tensor(data).view(getattr(torch, dtype)).view(shape)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Without a copy where the array may be written; Ray's shared memory may not, and torch insists."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
