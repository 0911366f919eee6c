"""The rules that our code leans on, asked of the server itself: the fake, and a real one where KUBECONFIG names it."""

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException


@pytest.fixture
def patch(cluster):
    def send(body, content_type, plural="rayservices", name="mesh", **options):
        patching = client.ApiClient(cluster.api_client.configuration)
        patching.set_default_header("Content-Type", content_type)
        return client.CustomObjectsApi(patching).patch_namespaced_custom_object(
            "ray.io", "v1", cluster.namespace, plural, name, body, **options
        )

    return send


GROUP = "/spec/rayClusterConfig/workerGroupSpecs/1"
JSON_PATCH, MERGE_PATCH = "application/json-patch+json", "application/merge-patch+json"


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        ([{"op": "test", "path": f"{GROUP}/groupName", "value": "engine"}], JSON_PATCH, 422),
        ([{"op": "replace", "path": "/spec/nothing/here", "value": 1}], JSON_PATCH, 422),
        ([{"op": "add", "path": f"{GROUP}/replicas", "value": "three"}], JSON_PATCH, 422),
        ([{"op": "add", "path": "/metadata/resourceVersion", "value": "1"}], JSON_PATCH, 409),
        ([{"op": "add", "path": f"{GROUP}/replicas", "value": 3}], MERGE_PATCH, 400),
        ({"spec": {}}, "application/strategic-merge-patch+json", 415),
    ],
)
def test_what_is_refused(cluster, ray_service, patch, body, content_type, status):
    ray_service()
    with pytest.raises(ApiException) as refused:
        patch(body, content_type)
    assert refused.value.status == status


def test_unknown_fields_vanish_unless_validation_is_strict(cluster, ray_service, patch):
    ray_service()
    body = [{"op": "add", "path": f"{GROUP}/replica", "value": 3}]
    assert "replica" not in patch(body, JSON_PATCH)["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    with pytest.raises(ApiException) as refused:
        patch(body, JSON_PATCH, field_validation="Strict")
    assert refused.value.status == 400
    assert "replica" in refused.value.body


def test_status_is_written_only_through_its_subresource(cluster, ray_service, patch):
    ray_service()
    patch([{"op": "replace", "path": "/status/serviceStatus", "value": "Mine"}], JSON_PATCH)
    assert cluster.get("RayService", "mesh")["status"]["serviceStatus"] == "Running"
