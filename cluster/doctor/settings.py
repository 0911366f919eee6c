"""Would `serve` refuse a setting that is valid by itself: for this model, these devices, these files?"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.config.mesh import MeshConfig
from cluster.doctor.finding import Finding


def check_settings(config: MeshConfig, *, here: bool) -> Iterator[Finding]:
    """What `serve` checks before it starts anything. here: it is to be served on this machine."""
    # Torch and Ray come with this import: late, so that the other checks answer where they are broken.
    from cluster.preflight import setting_problems

    problems = setting_problems(config, here=here)
    for problem in problems:
        yield Finding(check="settings", status="fail", found=problem, todo="change it in mesh.yaml")
    if not problems:
        yield Finding(check="settings", status="ok", found="fit the model and the devices")
