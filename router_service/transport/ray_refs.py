"""Calls as Ray actor tasks: the messages of ExpertService, long ones as objects that a node's groups share.

A group's actor announces the group with `serve_calls`; the router finds the actor by name and starts what
`ray_group` defines in it.
"""

from __future__ import annotations

import itertools
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch
from ray.exceptions import RayError

from experts.errors import RequestError
from experts.node_call import NodeCall
from experts.spec import ExpertCall
from experts.wire.canceller import Canceller
from experts.wire.codec import decode_partial, encode_call
from router_service.placement import GroupReplica
from router_service.transport.base import ReplyAbandoned, TransportError
from router_service.transport.ray_actors import RayActors
from router_service.transport.ray_group import Message, forward, from_message, to_message
from router_service.transport.wire_dtype import WireDtype, wire_dtypes

# How often a waiting reply looks whether its replica was dropped.
_LOOK_S = 0.25


class _Reply:
    """until: when the call's own time limit passes, on the monotonic clock. skip: has the group not begin it"""

    def __init__(
        self,
        actors: RayActors,
        replica: GroupReplica,
        future: Future[Message],
        until: float,
        skip: Callable[[], None],
    ) -> None:
        self._actors = actors
        self._actor = replica.actor
        self._where = f"{replica.replica} in actor {replica.actor}"
        self._future = future
        self._until = until
        self._skip = skip
        self._is_cancelled = False

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        given_up = _until(timeout_s)
        while True:
            now = time.monotonic()
            try:
                message = self._future.result(max(0.0, min(_LOOK_S, self._until - now, given_up - now)))
                break
            except RayError as error:
                self._check_wanted()
                raise TransportError(f"{self._where}: {type(error).__name__}") from error
            except TimeoutError:
                self._check(given_up)
        wire = decode_partial(from_message(message))
        self._check_wanted()
        if isinstance(wire.error, RequestError):
            raise wire.error
        if wire.error is not None:
            raise TransportError(f"{self._where}: {wire.error}")
        assert wire.partial_TH is not None, "a reply holds an answer or an error"
        return wire.partial_TH

    def _check(self, given_up: float) -> None:
        """Raise where there is nothing to wait for any more."""
        self._check_wanted()
        now = time.monotonic()
        if now >= self._until:
            self.cancel()
            raise ReplyAbandoned(f"{self._where}: no reply within the call's time limit")
        if not self._actors.knows(self._actor):
            raise TransportError(f"{self._where}: the replica left the placement table")
        if now >= given_up:
            raise TransportError(f"{self._where}: no reply in time")

    def cancel(self) -> None:
        """The answer is dropped, who waits for it gives up, and a call that is in the actor's queue is skipped."""
        # Not by `ray.cancel`: of a task that was not sent yet it leaves a gap in the actor's queue, for which Ray
        # (2.60) waits 30 s and then fails everything behind it.
        if self._is_cancelled or self._future.done():
            return
        self._is_cancelled = True
        self._skip()

    def _check_wanted(self) -> None:
        if self._is_cancelled:
            raise ReplyAbandoned(f"{self._where}: cancelled by its caller")


class RayRefsTransport:
    """Actors are looked up by `GroupReplica.actor` in `namespace`. Ray must be initialised. Thread-safe.

    Only a call that nobody wants any more is told to its group by gRPC, at `GroupReplica.address`: a task that waits in
    an actor's queue would hear of nothing that came by Ray behind it.

    wire_dtype: what tensors travel in, see `WireDtype`
    """

    def __init__(self, namespace: str, wire_dtype: WireDtype = "model") -> None:
        self._hidden_dtype, self._reply_dtype = wire_dtypes(wire_dtype)
        self._actors = RayActors(namespace)
        # At random: a group knows the calls of all its callers by them.
        self._call_ids = itertools.count(secrets.randbits(62))
        self._lock = threading.Lock()
        self._cancellers: dict[str, Canceller] = {}

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
        with self._lock:
            canceller = self._cancellers.pop(replica.actor, None)
        if canceller is not None:
            canceller.close()

    def close(self) -> None:
        self._actors.close()
        with self._lock:
            cancellers, self._cancellers = list(self._cancellers.values()), {}
        for canceller in cancellers:
            canceller.close()

    def _send(self, replica: GroupReplica, call: ExpertCall | NodeCall, until: float) -> _Reply:
        call_id = next(self._call_ids)
        request = encode_call(
            call,
            call_id,
            hidden_dtype=self._hidden_dtype or call.hidden_TH.dtype,
            reply_dtype=self._reply_dtype or call.hidden_TH.dtype,
        )
        future = self._actors.run(replica.actor, forward, to_message(request))
        return _Reply(self._actors, replica, future, until, partial(self._skip, replica, call_id))

    def _skip(self, replica: GroupReplica, call_id: int) -> None:
        with self._lock:
            if not self._actors.knows(replica.actor):
                return  # and computes nothing
            if replica.actor not in self._cancellers:
                self._cancellers[replica.actor] = Canceller(replica.address)
            self._cancellers[replica.actor].cancel(call_id)


def _until(timeout_s: float | None) -> float:
    return math.inf if timeout_s is None else time.monotonic() + timeout_s
