"""Where this user's machine keeps what need not be measured or compiled twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$EXPERTMESH_CACHE_DIR`, else `expertmesh` in the user's cache directory; it need not exist yet."""
    own = os.environ.get("EXPERTMESH_CACHE_DIR")
    if own is not None:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
