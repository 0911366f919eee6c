"""A transport that loses calls on request: how failover is proved."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from experts.node_call import NodeCall
from experts.spec import ExpertCall
from router_service.placement import GroupReplica
from router_service.transport.base import PendingReply, Transport, TransportError


class FaultyTransport:
    """Wraps another transport.

    A killed replica refuses calls and loses what is out; a flaky one loses the next n. A call to a node fails with
    any of its replicas.

    sent: replica -> calls sent to it, refused ones included
    node_calls: calls sent to whole nodes
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._killed: set[str] = set()
        self._to_lose: Counter[str] = Counter()
        self._changed = threading.Condition()
        self.sent: Counter[str] = Counter()
        self.node_calls = 0

    def kill(self, replica: str) -> None:
        """From now on every call to `replica` fails, those that are out too."""
        self._killed.add(replica)

    def lose_next(self, replica: str, calls: int) -> None:
        """The next `calls` calls to `replica` are sent and never answered."""
        self._to_lose[replica] += calls

    def wait_sent(self, replica: str, calls: int, timeout_s: float) -> bool:
        """Wait until `replica` was sent `calls` calls; False where the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: self.sent[replica] >= calls, timeout_s)

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> PendingReply:
        return self._send((replica,), lambda: self._inner.send(replica, call, timeout_s))

    def send_node(
        self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None
    ) -> PendingReply:
        self.node_calls += 1
        return self._send(replicas, lambda: self._inner.send_node(replicas, call, timeout_s))

    def forget(self, replica: GroupReplica) -> None:
        self._inner.forget(replica)

    def close(self) -> None:
        self._inner.close()

    def check(self, names: Sequence[str], message: str) -> None:
        """Raise TransportError where one of the replicas `names` was killed."""
        if self._killed.intersection(names):
            raise TransportError(f"{message} (injected)")

    def _send(self, replicas: Sequence[GroupReplica], send: Callable[[], PendingReply]) -> PendingReply:
        names = [replica.replica for replica in replicas]
        with self._changed:
            self.sent.update(names)
            self._changed.notify_all()
        self.check(names, "connection refused")
        for name in names:
            if self._to_lose[name]:
                self._to_lose[name] -= 1
                return _Lost()
        return _Reply(self, names, send())


class _Lost:
    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        raise TransportError("connection lost (injected)")

    def cancel(self) -> None:
        """Lost already."""


class _Reply:
    def __init__(self, transport: FaultyTransport, names: Sequence[str], inner: PendingReply) -> None:
        self._transport = transport
        self._names = names
        self._inner = inner

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        self._transport.check(self._names, "connection lost")
        return self._inner.result(timeout_s)

    def cancel(self) -> None:
        self._inner.cancel()
