"""Sockets of their own to several servers of this machine, which compiled code writes and reads.

What goes over them is what goes over `LocalStream`s: the servers see no difference. A lane belongs to one caller at a
time, who asks, and takes the answers before asking again, so that nobody has to be told whose answer comes next; when
anything is out of the ordinary it is closed, and all that is still owed with it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from experts.wire.local_stream import connect


class Lane:
    """sockets_G: int64, their numbers, ordered as the addresses were."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = sockets
        self.sockets_G = np.array([each.fileno() for each in sockets])

    @classmethod
    def to(cls, addresses: Sequence[str]) -> Lane | None:
        """A lane to the servers at `addresses` (host:port); None where one is not on this machine, or not ours."""
        with ExitStack() as unfinished:
            sockets = []
            for address in addresses:
                connected = connect(address)
                if connected is None:
                    return None
                sockets.append(unfinished.enter_context(connected))
            unfinished.pop_all()
            return cls(sockets)

    def close(self) -> None:
        """The servers drop what they have not answered."""
        for each in self._sockets:
            each.close()
