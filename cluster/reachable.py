"""Whether something listens at a Ray address: seconds, where Ray itself tries for minutes."""

from __future__ import annotations

import socket

_CONNECT_TIMEOUT_S = 5.0


def unreachable(address: str) -> str | None:
    """Why nothing can answer at host:port; None for forms that only Ray resolves (auto, local)."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None
