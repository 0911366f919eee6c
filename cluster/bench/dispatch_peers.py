"""Starts far ends of `cluster.bench.dispatch_peer`, a process each, here or on other hosts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cluster.bench.processes import announcing_processes


@contextmanager
def grpc_peers(hosts: Sequence[tuple[Sequence[str], str]]) -> Iterator[list[tuple[str, str]]]:
    """(group's address, echo's address) of each peer.

    hosts: for each peer what to put before its command, empty for this host, and the address to listen on
    """

    def command(prefix: Sequence[str], host: str, file: Path) -> Sequence[str]:
        return (*prefix, sys.executable, "-m", "cluster.bench.dispatch_peer", str(file), host)

    with announcing_processes([partial(command, prefix, host) for prefix, host in hosts]) as announced:
        pairs = [text.split() for text in announced]
        yield [(group, echo) for group, echo in pairs]
