"""Has Ray take `127.0.0.1` for an address like others."""

from __future__ import annotations

import os

from ray._private import ray_constants


def keep_loopback() -> None:
    """Let a Ray that is started from here listen on 127.0.0.1 only, and one that does so be joined.

    On Linux Ray puts the machine's address in a network wherever it is told 127.0.0.1, and then listens on every
    interface; on macOS and Windows it does not. It reads this variable when it is imported.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
