"""Every overlay, applied by our own `apply`: what stands there is what was built, field by field."""

import contextlib
import copy
import shutil
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import NotFoundError

from cluster.kubernetes.apply import apply
from cluster.kubernetes.connect import connect
from cluster.kubernetes.manifests import read_manifests

OVERLAYS = sorted((Path(__file__).parents[3] / "deploy" / "overlays").iterdir())


def missing(stands, built, path=""):
    """Paths of `built` that do not stand there as written; what the server adds is not looked at."""
    if isinstance(built, dict):
        if not isinstance(stands, dict):
            return [path]
        return [m for key, value in built.items() for m in missing(stands.get(key), value, f"{path}.{key}")]
    if isinstance(built, list):
        if not isinstance(stands, list) or len(stands) != len(built):
            return [path]
        return [m for i, value in enumerate(built) for m in missing(stands[i], value, f"{path}[{i}]")]
    return [] if stands == built else [path]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.name)
def test_an_applied_overlay_stands_as_it_was_built(overlay, cluster, tmp_path):
    if not (shutil.which("kubectl") or shutil.which("kustomize")):
        pytest.skip("neither kubectl nor kustomize is installed")
    manifests = [copy.deepcopy(m) for m in read_manifests(str(overlay)) if m["kind"] != "Namespace"]
    dynamic = DynamicClient(cluster.api_client, cache_file=str(tmp_path / "discovery.json"))
    groups = {group.name for group in client.ApisApi(cluster.api_client).get_api_versions().groups}
    manifests = [m for m in manifests if "/" not in m["apiVersion"] or m["apiVersion"].split("/")[0] in groups]
    for manifest in manifests:
        if "namespace" in manifest["metadata"]:
            manifest["metadata"]["namespace"] = cluster.namespace
        else:
            manifest["metadata"]["name"] += f"-{cluster.namespace}"  # shared by the whole cluster
        for subject in manifest.get("subjects", []):
            subject["namespace"] = cluster.namespace
    try:
        applied = list(apply(connect(cluster.kubeconfig), manifests, namespace=cluster.namespace))
        assert len(applied) == len(manifests)
        for manifest in manifests:
            resource = dynamic.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
            metadata = manifest["metadata"]
            stands = dynamic.get(resource, name=metadata["name"], namespace=metadata.get("namespace")).to_dict()
            assert missing(stands, manifest) == [], metadata["name"]
    finally:
        for manifest in manifests:
            if "namespace" not in manifest["metadata"]:
                resource = dynamic.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
                with contextlib.suppress(NotFoundError):
                    dynamic.delete(resource, name=manifest["metadata"]["name"])
