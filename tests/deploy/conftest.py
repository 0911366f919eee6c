import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
Objects = list[dict[str, Any]]


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a manifest with two is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{node.start_mark}: written twice: {twice}"
        return super().construct_mapping(node, deep)


def load_all(text: str) -> list[Any]:
    return list(yaml.load_all(text, Loader=UniqueKeyLoader))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`yaml_path`: every YAML under deploy/; `kustomization`: every directory that builds by itself."""
    if "yaml_path" in metafunc.fixturenames:
        paths = sorted(p for p in DEPLOY.rglob("*") if p.suffix in (".yaml", ".yml"))
        metafunc.parametrize("yaml_path", paths, ids=lambda p: str(p.relative_to(DEPLOY)))
    if "kustomization" in metafunc.fixturenames:
        found = sorted(DEPLOY.rglob("kustomization.yaml"))
        whole = [p.parent for p in found if load_all(p.read_text())[0]["kind"] == "Kustomization"]
        metafunc.parametrize("kustomization", whole, ids=lambda p: str(p.relative_to(DEPLOY)))


@pytest.fixture(scope="session")
def read_yaml() -> Callable[[Path], list[Any]]:
    return lambda path: load_all(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def kustomize() -> list[str]:
    """A kustomize that knows components, or a skip that says where to get one."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            probe = subprocess.run([*command, str(DEPLOY / "base")], capture_output=True, text=True, check=False)
            if probe.returncode == 0 or "unknown" not in probe.stderr:
                return command
    pytest.skip("no kustomize here that can build deploy/: install kubectl 1.21 or later, or kustomize 4 or later")


@pytest.fixture(scope="session")
def build(kustomize: list[str]) -> Callable[[Path], Objects]:
    """The objects of a kustomization, built once a session."""
    built: dict[Path, Objects] = {}

    def build_once(path: Path) -> Objects:
        if path not in built:
            result = subprocess.run([*kustomize, str(path)], capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{path.relative_to(ROOT)}: {result.stderr}"
            built[path] = load_all(result.stdout)
        return built[path]

    return build_once


@pytest.fixture
def objects(build: Callable[[Path], Objects], kustomization: Path) -> Objects:
    return build(kustomization)


@pytest.fixture
def ray_service(objects: Objects) -> dict[str, Any]:
    (service,) = (o for o in objects if o["kind"] == "RayService")
    return service


@pytest.fixture
def pod_templates(ray_service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod template of the head and of every worker group, by name."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}
