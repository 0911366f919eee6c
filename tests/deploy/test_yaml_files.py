"""Every YAML under deploy/ is of a kind that some test validates, and none lies there unused."""

from pathlib import Path

import pytest

from cluster.config.load import parse_mesh

DEPLOY = Path(__file__).parents[2] / "deploy"
MENTIONS = ("resources", "components", "patches", "configurations")


def mentioned(kustomization: Path, document: dict) -> set[Path]:
    entries = [entry for key in MENTIONS for entry in document.get(key, [])]
    paths = [entry["path"] if isinstance(entry, dict) else entry for entry in entries if "patch" not in entry]
    return {(kustomization.parent / path).resolve() for path in paths}


def test_every_file_is_validated_by_what_it_is(yaml_path, read_yaml):
    documents = read_yaml(yaml_path)
    assert documents
    for document in documents:
        if isinstance(document, list):
            assert all({"op", "path"} <= set(operation) for operation in document), "a JSON patch"
        elif "autoscaling" in document and yaml_path.parent.name == "policies":
            assert set(document) == {"autoscaling"}, "test_policies validates it"
        elif "model" in document:
            parse_mesh(document, origin=str(yaml_path))
        else:
            assert {"apiVersion", "kind"} <= set(document), "an object, built and validated with its kustomization"


def test_every_manifest_is_part_of_a_kustomization(yaml_path, read_yaml):
    if yaml_path.name == "kustomization.yaml":
        missing = [p for p in mentioned(yaml_path, read_yaml(yaml_path)[0]) if not p.exists()]
        assert not missing
    elif {"base", "components", "overlays"} & set(yaml_path.relative_to(DEPLOY).parts[:1]):
        beside = yaml_path.parent / "kustomization.yaml"
        assert yaml_path in mentioned(beside, read_yaml(beside)[0])


def test_every_component_and_the_base_are_used(read_yaml):
    kustomizations = sorted(DEPLOY.rglob("kustomization.yaml"))
    used = {path for k in kustomizations for path in mentioned(k, read_yaml(k)[0])}
    unused = {k.parent for k in kustomizations if "overlays" not in k.parts} - used
    assert not unused


@pytest.mark.parametrize(
    "name", ["local", "mixtral-8x7b", "mixtral-8x22b", "deepseek-v3", "deepseek-v3-h200", "kimi-k2"]
)
def test_the_promised_overlays_are_there(name):
    assert (DEPLOY / "overlays" / name / "kustomization.yaml").is_file()
