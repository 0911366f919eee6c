"""Has Ray take 127.0.0.1 for an address like others."""

from __future__ import annotations

from ray._private import ray_constants


def keep_loopback() -> None:
    """Let a Ray that this process starts listen on 127.0.0.1 only, and let it join one that does.

    On Linux Ray puts the machine's address in a network wherever it is told 127.0.0.1, and then listens on every
    interface; on macOS and Windows, without this, it does not.
    """
    # Its environment variable is read when Ray is imported, and would reach whatever this process starts.
    ray_constants.ENABLE_RAY_CLUSTER = False
