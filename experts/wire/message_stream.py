"""Messages both ways over one socket, written and read by the threads that call: no thread in between is woken."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

SEND_TIMEOUT_S = 60.0
"""A peer that takes nothing for so long is given up, and one that stops in the middle of a message."""

_READ_BYTES = 64 * 1024
_LATE = "no reply in time"


class StreamClosed(Exception):
    """The stream has ended, or never began; says why."""


class MessageStream(ABC):
    """Thread-safe; dies with its first error. Of the threads that wait for a message, one reads for all.

    connected: belongs to the stream from now on
    receive:   called with each message, by whichever thread reads
    """

    def __init__(self, connected: socket.socket, receive: Callable[[bytes], None]) -> None:
        self._socket = connected
        self._receive = receive
        self._error: StreamClosed | None = None
        self._changed = threading.Condition()
        self._reading = False
        self._one_message = threading.Lock()
        self._input = bytearray()
        self._until: float | None = None  # for who reads
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(SEND_TIMEOUT_S), 0))
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Write a message; waits while the peer does not take it. Raises StreamClosed."""

    @abstractmethod
    def _take(self) -> None:
        """Read what comes next, a message or a part of one, and wait for the rest of it."""

    @property
    def is_open(self) -> bool:
        """Whether a message can still be sent, as far as what has arrived says."""
        with self._changed:
            unasked = not self._reading and self._error is None and self._has_input(0)
            self._reading |= unasked
        if unasked:
            self._read(lambda: not self._has_input(0), time.monotonic() + SEND_TIMEOUT_S)
        return self._error is None

    def read_until(self, done: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Return once `done()`, which is asked at every message received; one of the threads that wait reads for all.

        Raises StreamClosed once the stream is dead, which it is too where this took longer than `timeout_s`.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._changed:
                while self._reading and self._error is None and not done():
                    if not self._changed.wait(_left(until)) and not done():
                        self._end(_LATE)
                if done():
                    return
                if self._error is not None:
                    raise self._error
                self._reading = True
            self._read(done, until)

    def close(self, reason: str) -> None:
        """End the stream; whoever waits gets `reason`."""
        with self._changed:
            self._end(reason)

    def _end(self, reason: str) -> None:
        if self._error is None:
            self._error = StreamClosed(reason)
            with suppress(OSError):  # the peer was faster
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes who reads
            if not self._reading:  # who reads may be about to wait for a number that another socket then has
                self._socket.close()
        self._changed.notify_all()

    def _read(self, done: Callable[[], bool], until: float | None) -> None:
        """Read until `done()` or the end, as the one thread that reads; errors are left in `_error`."""
        self._until = until
        try:
            while self._error is None and not done():
                if self._has_input(_left(until)):
                    self._take()
                    with self._changed:
                        self._changed.notify_all()  # it may be what another thread waits for
                else:
                    self.close(_LATE)
        except Exception as error:
            # Whatever it was, the stream cannot be followed any more.
            self.close(f"UNAVAILABLE: {error}" if isinstance(error, OSError) else str(error))
        finally:
            with self._changed:
                self._stop_reading()

    def _stop_reading(self) -> None:
        """Let another thread read. Call with `_changed` held."""
        self._reading = False
        if self._error is not None:
            self._socket.close()
        self._changed.notify_all()

    def _has_input(self, timeout_s: float | None) -> bool:
        return bool(self._input) or self._has_arrived(timeout_s)

    def _has_arrived(self, timeout_s: float | None) -> bool:
        return bool(self._poll.poll(None if timeout_s is None else timeout_s * 1e3))

    def _send_all(self, message: bytes) -> None:
        """Write all of it, one thread at a time. Raises StreamClosed."""
        try:
            self._socket.sendall(message)
        except BlockingIOError:
            self.close(f"DEADLINE_EXCEEDED: the peer took nothing for {SEND_TIMEOUT_S:g} s")
        except OSError as error:
            self.close(f"UNAVAILABLE: {error}")
        if self._error is not None:
            raise self._error

    def _bytes(self, size: int) -> bytearray:
        """The next `size` bytes."""
        while len(self._input) < size:
            self._input += self._receive_some(size - len(self._input))
        taken = self._input[:size]
        del self._input[:size]
        return taken

    def _receive_some(self, wanted: int = 0) -> bytes:
        """What has arrived, or the first of what will."""
        while True:
            try:
                received = self._socket.recv(max(_READ_BYTES, wanted), socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not self._has_arrived(_left(self._until)):
                    raise StreamClosed(_LATE) from None
                continue
            if not received:
                raise StreamClosed("UNAVAILABLE: the connection was closed by the peer")
            return received


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())
