"""Do the experts fit this machine's memory, where they are to run on its CPU?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cluster.config.mesh import MeshConfig
from cluster.doctor.finding import Finding

_GIB = 2**30
# CPU backends compute in float32: twice the bytes of a 16-bit checkpoint, unless experts are held narrower.
_WIDENING = {"none": 2.0, "fp16": 1.0, "int8": 0.55, "fp8": 0.55, "int4": 0.3}


def check_memory(config: MeshConfig, *, available: int | None = None) -> Iterator[Finding]:
    """The checkpoint's files, widened as CPU groups hold them, and the KV cache, against the memory that is here."""
    yield from _check_weights(config, available)
    cache, whole = config.engine.kv_cache_memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cache != "auto" and config.engine.device != "cuda" and cache > whole:
        yield Finding(
            check="memory",
            status="warn",
            found=f"engine.kv_cache_memory is {cache / _GIB:.1f} GiB, this machine has {whole / _GIB:.1f} GiB",
            todo="lower it, or leave it at auto; on a GPU it is the card's memory that counts",
        )


def _check_weights(config: MeshConfig, available: int | None) -> Iterator[Finding]:
    folder = Path(config.model.source)
    if not folder.is_dir():
        return
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = stored * _WIDENING[config.model.quantization]
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = f"about {needed / _GIB:.1f} GiB of {available / _GIB:.1f} GiB free"
    if needed > available:
        yield Finding(
            check="memory",
            status="warn",
            found=f"on the CPU the weights take {sizes}",
            todo="model.quantization: int8, more machines, or `expertmesh plan` for GPUs",
        )
    else:
        yield Finding(check="memory", status="ok", found=f"on the CPU the weights take {sizes}")
