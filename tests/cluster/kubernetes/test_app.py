import json

import pytest
import yaml
from typer.testing import CliRunner

from cluster.kubernetes.app import app
from experts.errors import ConfigError


@pytest.fixture
def run(cluster):
    def invoke(*arguments):
        options = ["--kubeconfig", str(cluster.kubeconfig), "--namespace", cluster.namespace]
        result = CliRunner().invoke(app, [*arguments, *options])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def test_scale_then_status(cluster, ray_service, run):
    ray_service(engine=1, experts=2)
    lines = run("scale", "experts=3", "--name", "mesh").output.splitlines()
    assert lines == ["RayService/mesh: experts 2 -> 3", "RayCluster/mesh-abcde: experts 2 -> 3"]
    result = run("status", "--name", "mesh", "--json")
    found = json.loads(result.output)
    assert result.exit_code == 1, "no pod is there yet"
    assert found["settled"] is False
    assert [group["service_replicas"] for group in found["groups"]] == [1, 3]
    table = run("status", "--name", "mesh").output
    assert "experts" in table
    assert "Running" in table


def test_status_of_what_is_settled_exits_with_0(cluster, ray_service, run):
    ray_service(engine=0, experts=0)
    assert run("status", "--name", "mesh").exit_code == 0


def test_apply_says_what_it_did(tmp_path, run):
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "mesh"}}
    path = tmp_path / "account.yaml"
    path.write_text(yaml.safe_dump(account))
    assert "ServiceAccount/mesh in" in run("apply", str(path)).output
    assert "would be applied" in run("apply", str(path), "--dry-run").output


@pytest.mark.parametrize("text", ["experts", "experts=", "=3", "experts=three", "experts=-1", "experts=1.5"])
def test_scale_wants_group_and_number(run, text):
    with pytest.raises(ConfigError, match="write GROUP=PODS"):
        run("scale", "--", text) if text.startswith("-") else run("scale", text)
