"""What can be said of the Dockerfiles without building them."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "images").glob("Dockerfile.*"))
OURS = [p for p in DOCKERFILES if p.suffix in (".cpu", ".cuda")]


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", path.read_text()))
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def arguments(path: Path) -> dict[str, str]:
    return dict(value.split("=", 1) for name, value in instructions(path) if name == "ARG")


@pytest.fixture(params=DOCKERFILES, ids=lambda p: p.name)
def dockerfile(request):
    return request.param


def test_bases_are_pinned_and_nobody_is_root(dockerfile):
    steps, args = instructions(dockerfile), arguments(dockerfile)
    bases = [re.sub(r"\$\{(\w+)\}", lambda m: args[m[1]], v.split()[0]) for n, v in steps if n == "FROM"]
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases), bases
    last_stage = steps[max(i for i, step in enumerate(steps) if step[0] == "FROM") :]
    assert [v for n, v in last_stage if n == "USER"][-1] == "1000:1000"


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_built_in_one_stage_run_from_another_without_a_model(path):
    steps = instructions(path)
    stages = [v for n, v in steps if n == "FROM"]
    assert len(stages) == 2
    assert stages[0].endswith("AS build")
    copied = [v for n, v in steps if n == "COPY"]
    assert not any("demo-model" in v or "deploy" in v for v in copied)
    assert "pip install" not in " ".join(v for n, v in steps[steps.index(("FROM", stages[1])) :])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_is_copied_is_there_and_sent_to_the_builder(path):
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, value in instructions(path):
        if name == "COPY" and "--from" not in value:
            sources = [part for part in value.split()[:-1] if not part.startswith("--")]
            assert set(sources) <= sent
            assert all((ROOT / source).exists() or source == "deploy/demo-model" for source in sources)


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_versions_agree_with_the_manifests_and_the_project(path, build):
    torch = arguments(path)["TORCH"]
    assert f"torch=={torch}" in (ROOT / "constraints.txt").read_text().splitlines()

    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'(?m)^version = "(.+)"', pyproject)[1]
    flavour = path.suffix[1:]
    tagged = [
        container["image"]
        for overlay in sorted((ROOT / "deploy" / "overlays").iterdir())
        for item in build(overlay)
        if item["kind"] == "RayService"
        for group in item["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
        if container["image"].endswith(flavour)
    ]
    assert set(tagged) <= {f"expertmesh:{version}-{flavour}"}


def test_ray_is_the_version_that_is_tested():
    base = yaml.safe_load((ROOT / "deploy" / "base" / "rayservice.yaml").read_text())
    version = base["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
