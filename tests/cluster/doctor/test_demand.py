from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config.mesh import MeshConfig
from cluster.doctor.demand import demand


@pytest.mark.parametrize(
    ("sections", "has_gpu", "gpus"),
    [
        ({"experts": {"groups": 4}}, True, 5),
        ({"experts": {"groups": 4}}, False, 0),
        ({"experts": {"groups": 4, "num_gpus": 0.25}, "engine": {"replicas": 2}}, True, 3),
        ({"experts": {"groups": 4, "device": "cpu"}}, True, 1),
        ({"experts": {"groups": 2, "device": "cuda"}, "engine": {"device": "cpu"}}, False, 2),
        ({"experts": {"groups": 4}, "router": {"transport": "in_process"}}, True, 1),
    ],
)
def test_gpus(mesh_for: Callable[..., MeshConfig], sections: dict[str, Any], has_gpu: bool, gpus: float) -> None:
    assert demand(mesh_for(Path("m"), **sections), has_gpu=has_gpu).gpus == gpus


def test_cpus(mesh_for: Callable[..., MeshConfig]) -> None:
    mesh = mesh_for(Path("m"), experts={"groups": 4, "num_cpus": 0.5}, engine={"replicas": 2, "num_cpus": 1})
    assert demand(mesh, has_gpu=False).cpus == 4
