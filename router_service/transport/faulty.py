"""A transport that loses calls on request: how failover is proved."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from experts.spec import ExpertCall
from router_service.placement import GroupReplica
from router_service.transport.base import PendingReply, Transport, TransportError


class _Lost:
    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        raise TransportError("connection lost (injected)")


class FaultyTransport:
    """Wraps another transport. A killed replica refuses calls and loses what is out; a flaky one loses the
    next n."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._killed: set[str] = set()
        self._to_lose: Counter[str] = Counter()
        self._sent = threading.Condition()
        self.sent: Counter[str] = Counter()

    def kill(self, replica: str) -> None:
        """From now on every call to `replica` fails, those that are out too."""
        self._killed.add(replica)

    def lose_next(self, replica: str, calls: int) -> None:
        """The next `calls` calls to `replica` are sent and never answered."""
        self._to_lose[replica] += calls

    def wait_sent(self, replica: str, calls: int, timeout_s: float) -> bool:
        """Wait until `replica` was sent `calls` calls, refused ones included; False where the time ran
        out."""
        with self._sent:
            return self._sent.wait_for(lambda: self.sent[replica] >= calls, timeout_s)

    def send(self, replica: GroupReplica, call: ExpertCall) -> PendingReply:
        name = replica.replica
        with self._sent:
            self.sent[name] += 1
            self._sent.notify_all()
        if name in self._killed:
            raise TransportError("connection refused (injected)")
        if self._to_lose[name]:
            self._to_lose[name] -= 1
            return _Lost()
        return _Reply(self, name, self._inner.send(replica, call))

    def forget(self, replica: GroupReplica) -> None:
        self._inner.forget(replica)

    def close(self) -> None:
        self._inner.close()

    def is_killed(self, replica: str) -> bool:
        return replica in self._killed


class _Reply:
    def __init__(self, transport: FaultyTransport, replica: str, inner: PendingReply) -> None:
        self._transport = transport
        self._replica = replica
        self._inner = inner

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        if self._transport.is_killed(self._replica):
            raise TransportError("connection lost (injected)")
        return self._inner.result(timeout_s)
