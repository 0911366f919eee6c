"""Calls as Ray actor tasks, tensors as objects: a batch crosses to a node once, and its groups read one copy of it.

A group's actor announces the group with `serve_calls`; the router finds the actor by name and starts what
`ray_group` defines in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from ray.exceptions import RayError, RayTaskError

from experts.node_call import NodeCall
from experts.spec import ExpertCall
from router_service.placement import GroupReplica
from router_service.transport.base import ReplyAbandoned, TransportError
from router_service.transport.ray_actors import RayActors
from router_service.transport.ray_group import Outcome, RayShare, Refusal, forward, forward_node, pack, tensor

# How often a waiting reply looks whether its replica was dropped.
_LOOK_S = 0.25


class _Reply:
    """until: when the call's own time limit passes, on the monotonic clock"""

    def __init__(self, actors: RayActors, replica: GroupReplica, future: Future[Outcome], until: float) -> None:
        self._actors = actors
        self._replica = replica
        self._future = future
        self._until = until

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        given_up = _until(timeout_s)
        if self._until - given_up < _LOOK_S:
            # Who waits to the end of the call's own limit counted it from a moment before we did.
            given_up = math.inf
        where = f"{self._replica.replica} in actor {self._replica.actor}"
        while True:
            now = time.monotonic()
            try:
                outcome = self._future.result(max(0.0, min(_LOOK_S, self._until - now, given_up - now)))
                break
            except RayTaskError as error:
                raise TransportError(f"{where}: the group failed: {error.cause}") from error
            except RayError as error:
                raise TransportError(f"{where}: {type(error).__name__}") from error
            except TimeoutError:
                self._check(where, given_up)
        if isinstance(outcome, Refusal):
            raise outcome.error()
        return tensor(outcome)

    def _check(self, where: str, given_up: float) -> None:
        """Raise where there is nothing to wait for any more."""
        now = time.monotonic()
        if now >= self._until:
            raise ReplyAbandoned(f"{where}: no reply within the call's time limit")
        if not self._actors.knows(self._replica.replica):
            raise TransportError(f"{where}: the replica left the placement table")
        if now >= given_up:
            raise TransportError(f"{where}: no reply within the deadline")

    def cancel(self) -> None:
        """Ray cannot take back an actor's task that began; the answer is dropped, and who waits for it gives up."""
        self._until = -math.inf


class RayRefsTransport:
    """Actors are looked up by `GroupReplica.actor` in `namespace`. Ray must be initialised. Thread-safe."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._actors = RayActors(namespace)

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> _Reply:
        until = _until(timeout_s)
        arguments = call.layer, pack(call.hidden_TH), RayShare.of(replica, call)
        future = self._actors.run(replica.replica, replica.actor, forward, *arguments)
        return _Reply(self._actors, replica, future, until)

    def send_node(self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None) -> _Reply:
        # Not the one that the call names: see `ray_group` for why the lowest.
        relay, until = replicas[0], _until(timeout_s)
        shares = [RayShare.of(replica, share) for replica, share in zip(replicas, call.shares, strict=True)]
        arguments = self._namespace, call.layer, pack(call.hidden_TH), shares
        future = self._actors.run(relay.replica, relay.actor, forward_node, *arguments)
        return _Reply(self._actors, relay, future, until)

    def forget(self, replica: GroupReplica) -> None:
        self._actors.forget(replica.replica)

    def close(self) -> None:
        self._actors.close()


def _until(timeout_s: float | None) -> float:
    return math.inf if timeout_s is None else time.monotonic() + timeout_s
