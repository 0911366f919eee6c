"""Every sample under deploy/policies is a section of mesh.yaml that Serve can follow, and every policy has a sample."""

from pathlib import Path

import pytest
import yaml

from cluster.autoscale import policies
from cluster.autoscale.check import check_autoscaling
from cluster.config.load import parse_mesh

SAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "policies").glob("*.yaml"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_sample_is_followed_by_serve_and_explained(path):
    text = path.read_text()
    assert text.startswith("# ")
    mesh = parse_mesh({"model": {"source": "somewhere"}, **yaml.safe_load(text)}, origin=path.name)
    assert mesh.autoscaling.experts is not None
    check_autoscaling(mesh.autoscaling.experts, "autoscaling.experts", from_zero=False)
    if mesh.autoscaling.engine is not None:
        check_autoscaling(mesh.autoscaling.engine, "autoscaling.engine")


def test_every_policy_has_a_sample():
    used = {
        yaml.safe_load(path.read_text())["autoscaling"]["experts"]["policy"]["policy_function"].split(":")[1]
        for path in SAMPLES
    }
    assert used == set(policies.__all__) - {"Policy"}
