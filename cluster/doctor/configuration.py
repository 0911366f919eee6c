"""Is mesh.yaml one that can be read?"""

from __future__ import annotations

from pathlib import Path

from cluster.config.load import load_mesh
from cluster.config.mesh import MeshConfig
from cluster.doctor.finding import Finding
from experts.errors import ConfigError


def check_configuration(path: Path) -> tuple[list[Finding], MeshConfig | None]:
    """The findings, one for each mistake, and the configuration where there is none."""
    try:
        config = load_mesh(path)
    except ConfigError as error:
        todo = "correct mesh.yaml; cluster/config/mesh.py describes its keys"
        lines = str(error).splitlines()
        return [Finding(check="config", status="fail", found=line, todo=todo) for line in lines], None
    return [Finding(check="config", status="ok", found=f"{path}: {config.experts.groups} expert groups")], config
