"""Calls as Ray actor tasks: the messages of ExpertService, long ones as objects that a node's groups share.

A group's actor announces the group with `serve_calls`; the router finds the actor by name and starts what
`ray_group` defines in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from ray.exceptions import RayError

from experts.errors import RequestError
from experts.node_call import NodeCall
from experts.spec import ExpertCall
from experts.wire.codec import decode_partial, encode_call
from router_service.placement import GroupReplica
from router_service.transport.base import ReplyAbandoned, TransportError
from router_service.transport.ray_actors import RayActors
from router_service.transport.ray_group import Message, forward, from_message, to_message
from router_service.transport.wire_dtype import WireDtype, wire_dtypes

# How often a waiting reply looks whether its replica was dropped.
_LOOK_S = 0.25


class _Reply:
    """until: when the call's own time limit passes, on the monotonic clock"""

    def __init__(self, actors: RayActors, replica: GroupReplica, future: Future[Message], until: float) -> None:
        self._actors = actors
        self._actor = replica.actor
        self._where = f"{replica.replica} in actor {replica.actor}"
        self._future = future
        self._until = until

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        given_up = _until(timeout_s)
        if self._until - given_up < _LOOK_S:
            # Who waits to the end of the call's own limit counted it from a moment before we did.
            given_up = math.inf
        while True:
            now = time.monotonic()
            try:
                message = self._future.result(max(0.0, min(_LOOK_S, self._until - now, given_up - now)))
                break
            except RayError as error:
                raise TransportError(f"{self._where}: {type(error).__name__}") from error
            except TimeoutError:
                self._check(given_up)
        wire = decode_partial(from_message(message))
        if isinstance(wire.error, RequestError):
            raise wire.error
        if wire.error is not None:
            raise TransportError(f"{self._where}: {wire.error}")
        assert wire.partial_TH is not None, "a reply holds an answer or an error"
        return wire.partial_TH

    def _check(self, given_up: float) -> None:
        """Raise where there is nothing to wait for any more."""
        now = time.monotonic()
        if now >= self._until:
            raise ReplyAbandoned(f"{self._where}: no reply within the call's time limit")
        if not self._actors.knows(self._actor):
            raise TransportError(f"{self._where}: the replica left the placement table")
        if now >= given_up:
            raise TransportError(f"{self._where}: no reply within the deadline")

    def cancel(self) -> None:
        """The answer is dropped, and who waits for it gives up; what the actor has in its queue it computes."""
        # Not `ray.cancel`: of a task that was not sent yet it leaves a gap in the actor's queue, for which Ray (2.60)
        # waits 30 s and then fails everything behind it.
        self._until = -math.inf


class RayRefsTransport:
    """Actors are looked up by `GroupReplica.actor` in `namespace`. Ray must be initialised. Thread-safe.

    wire_dtype: what tensors travel in, see `WireDtype`
    """

    def __init__(self, namespace: str, wire_dtype: WireDtype = "model") -> None:
        self._hidden_dtype, self._reply_dtype = wire_dtypes(wire_dtype)
        self._actors = RayActors(namespace)

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> _Reply:
        return self._send(replica, call, _until(timeout_s))

    def send_node(self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None) -> _Reply:
        # Not to the one that the call names: see `ray_group` for why the lowest.
        relay, *others = replicas
        actors = ["", *(replica.actor for replica in others)]
        shares = tuple(replace(share, address=actor) for share, actor in zip(call.shares, actors, strict=True))
        return self._send(relay, replace(call, shares=shares), _until(timeout_s))

    def forget(self, replica: GroupReplica) -> None:
        self._actors.forget(replica.actor)

    def close(self) -> None:
        self._actors.close()

    def _send(self, replica: GroupReplica, call: ExpertCall | NodeCall, until: float) -> _Reply:
        request = encode_call(
            call,
            hidden_dtype=self._hidden_dtype or call.hidden_TH.dtype,
            reply_dtype=self._reply_dtype or call.hidden_TH.dtype,
        )
        future = self._actors.run(replica.actor, forward, to_message(request))
        return _Reply(self._actors, replica, future, until)


def _until(timeout_s: float | None) -> float:
    return math.inf if timeout_s is None else time.monotonic() + timeout_s
