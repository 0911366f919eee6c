"""Starts far ends of `cluster.bench.dispatch_peer`, a process each, here or on other hosts."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.bench.processes import child_process, log_tail
from experts.errors import MeshError

_START_TIMEOUT_S = 120.0


@contextmanager
def grpc_peers(hosts: Sequence[tuple[Sequence[str], str]]) -> Iterator[list[tuple[str, str]]]:
    """(group's address, echo's address) of each peer.

    hosts: for each peer what to put before its command, empty for this host, and the address to listen on
    """
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as directory, ExitStack() as stack:
        started = []
        for peer, (prefix, host) in enumerate(hosts):
            address, log = Path(directory, f"{peer}.address"), Path(directory, f"{peer}.log")
            argv = (*prefix, sys.executable, "-m", "cluster.bench.dispatch_peer", str(address), host)
            started.append((stack.enter_context(child_process(argv, env=os.environ, log=log)), address, log))
        peers = []
        deadline = time.monotonic() + _START_TIMEOUT_S
        for process, address, log in started:
            while not address.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise MeshError(f"a benchmark peer did not start:\n{log_tail(log)}")
                time.sleep(0.02)
            group, echo = address.read_text().split()
            peers.append((group, echo))
        yield peers
