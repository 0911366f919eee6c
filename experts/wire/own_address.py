"""Whether an address is this machine's."""

from __future__ import annotations

import socket


def is_own(address: str) -> bool:
    """Whether `address` (host:port) is one of this machine's, as far as this process's network shows."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(found)
    except OSError:
        return False
    return True
