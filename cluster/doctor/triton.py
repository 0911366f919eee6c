"""Can kernels be compiled, where there is a GPU to compile for?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import metadata

from cluster.doctor.finding import Finding


def check_triton() -> Iterator[Finding]:
    """Triton is here, has a C compiler for its launchers, and can write its cache."""
    import torch  # late, so that the other checks answer where it is broken

    needed = torch.cuda.is_available()
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        yield Finding(
            check="triton",
            status="fail" if needed else "ok",
            found="Triton is not installed" + ("" if needed else "; without a GPU nothing needs it"),
            todo="pip install triton" if needed else "",
        )
        return
    yield Finding(check="triton", status="ok", found=f"Triton {version}")
    if not needed:
        return
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield Finding(
            check="triton",
            status="fail",
            found="no C compiler: Triton builds its launchers with one",
            todo="install gcc, or set CC",
        )
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".triton")
    place = cache
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK):
        yield Finding(
            check="triton",
            status="fail",
            found=f"{cache}: compiled kernels cannot be kept there",
            todo="set TRITON_CACHE_DIR to a folder that can be written",
        )
