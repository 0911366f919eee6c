"""Which GPUs are here, does their driver go with this torch, and are they enough?"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from cluster.config.mesh import MeshConfig
from cluster.doctor.demand import demand
from cluster.doctor.finding import Finding

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def check_gpus(config: MeshConfig | None, *, here: bool) -> Iterator[Finding]:
    """here: this machine is where the model is to be served; else its GPUs do not count."""
    import torch  # late, so that the other checks answer where it is broken

    listed, trouble = _driver()
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if trouble:
        yield Finding(check="gpus", status="warn", found=trouble, todo="reload or reinstall the NVIDIA driver")
    if listed and not visible:
        why = "built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        yield Finding(
            check="gpus",
            status="warn",
            found=f"the driver lists {len(listed)} GPUs ({listed[0]}), torch {torch.__version__} ({why}) sees none",
            todo="install a torch for CUDA that the driver supports; check CUDA_VISIBLE_DEVICES",
        )
    for index in range(visible):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(check="gpus", status="ok", found=f"GPU {index}: {name}, compute capability {major}.{minor}")
    if not visible:
        yield Finding(check="gpus", status="ok", found="no GPU here: engine and experts run on the CPU")
    if config is not None and here:
        needed = demand(config, has_gpu=visible > 0).gpus
        if needed > visible:
            yield Finding(
                check="gpus",
                status="fail",
                found=f"mesh.yaml asks for {needed:g} GPUs, one for each engine and expert group; {visible} are here",
                todo="lower experts.groups, set num_gpus to a part of a GPU, use device: cpu, or join a cluster",
            )


def _driver() -> tuple[list[str], str]:
    """What nvidia-smi lists, and why it could not; neither where there is no driver."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, PermissionError):
        return [], ""
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer within 20 s"
    if answer.returncode != 0:
        return [], f"nvidia-smi fails: {(answer.stdout + answer.stderr).strip().splitlines()[0]}"
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()], ""
