"""Groups' actors by name, and how to start a function inside one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from router_service.transport.base import TransportError

# Ray gives every actor this group with a thread of its own, so that a call does not hold up an async
# actor's loop.
_CONCURRENCY_GROUP = "_ray_system"


class RayActors:
    """Actors of `namespace`, each looked up once. Ray must be initialised. Thread-safe."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._lock = threading.Lock()
        self._actors: dict[str, Any] = {}
        self._closed = False

    def run(self, actor: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start `function(actor's instance, *arguments)` in the actor named `actor`.

        The future raises Ray's errors. Raises TransportError where there is no such actor, or after `close`.
        """
        # A `ray.get` that gives up drops the transfer that it began, and the next one has all of it sent anew; whoever
        # waits for a future may look up as often as they like.
        call = self._actor(actor).__ray_call__.options(concurrency_group=_CONCURRENCY_GROUP)
        future: Future[Any] = call.remote(function, *arguments).future()
        return future

    def knows(self, actor: str) -> bool:
        """Whether `actor` was called and not forgotten since."""
        return actor in self._actors

    def forget(self, actor: str) -> None:
        """Let go of an actor."""
        with self._lock:
            self._actors.pop(actor, None)

    def close(self) -> None:
        """Let go of every actor; `run` fails from now on."""
        with self._lock:
            self._closed = True
            self._actors.clear()

    def _actor(self, actor: str) -> Any:
        known = self._actors.get(actor)
        if known is not None:
            return known
        if self._closed:
            raise TransportError("the transport was closed")
        try:
            found = ray.get_actor(actor, namespace=self._namespace)
        except ValueError as error:
            raise TransportError(f"no actor {actor!r} is alive in Ray") from error
        with self._lock:
            return self._actors.setdefault(actor, found)
