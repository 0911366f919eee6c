"""A small API server that refuses what the real one refuses, behind the same fixtures as a real one.

Every test runs against it, and, marked `kubernetes`, a second time against the cluster of KUBECONFIG (KubeRay's CRDs
installed, its operator not needed, in a namespace that is made and deleted). Those that bend the server's will skip
there.
"""

import contextlib
import copy
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from kubernetes import client, config

JSON_PATCH, MERGE_PATCH = "application/json-patch+json", "application/merge-patch+json"
STRATEGIC, APPLY = "application/strategic-merge-patch+json", "application/apply-patch+yaml"
NAMESPACED = {
    "v1": {"ConfigMap", "ServiceAccount", "Service", "PersistentVolumeClaim", "Pod", "Event", "Secret"},
    "rbac.authorization.k8s.io/v1": {"Role", "RoleBinding"},
    "policy/v1": {"PodDisruptionBudget"},
    "networking.k8s.io/v1": {"NetworkPolicy"},
    "monitoring.coreos.com/v1": {"ServiceMonitor"},
    "ray.io/v1": {"RayService", "RayCluster"},
}
CLUSTER_WIDE = {"v1": {"Namespace", "Node"}, "rbac.authorization.k8s.io/v1": {"ClusterRole", "ClusterRoleBinding"}}
# What the CRDs know of the fields that these tests touch; int and str are types, ... is anything.
GROUP_FIELDS = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "numOfHosts": int,
    "labels": ...,
    "rayStartParams": ...,
    "template": ...,
    "scaleStrategy": {"workersToDelete": ...},
}
CLUSTER_FIELDS = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "authOptions": ...,
    "autoscalerOptions": ...,
    "headGroupSpec": ...,
    "workerGroupSpecs": [GROUP_FIELDS],
}
SPEC_FIELDS = {
    "RayCluster": CLUSTER_FIELDS,
    "RayService": {
        "serveConfigV2": str,
        "rayClusterConfig": CLUSTER_FIELDS,
        "upgradeStrategy": ...,
        "excludeHeadPodFromServeSvc": bool,
    },
}


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str, causes: list[dict[str, str]] | None = None) -> None:
        self.code, self.reason, self.message, self.causes = code, reason, message, causes or []


def plural_of(kind: str) -> str:
    return kind.lower()[:-1] + "ies" if kind.endswith("Policy") else kind.lower() + "s"


KIND_OF = {plural_of(k): k for kinds in (NAMESPACED, CLUSTER_WIDE) for group in kinds.values() for k in group}


def unknown_fields(value: Any, fields: Any, path: str) -> list[str]:
    if isinstance(fields, list) and isinstance(value, list):
        return [u for i, item in enumerate(value) for u in unknown_fields(item, fields[0], f"{path}[{i}]")]
    if not isinstance(fields, dict) or not isinstance(value, dict):
        return []
    found = [f"{path}.{key}" for key in value if key not in fields]
    return found + [u for k, v in value.items() if k in fields for u in unknown_fields(v, fields[k], f"{path}.{k}")]


def pruned(value: Any, fields: Any) -> Any:
    if isinstance(fields, list) and isinstance(value, list):
        return [pruned(item, fields[0]) for item in value]
    if isinstance(fields, dict) and isinstance(value, dict):
        return {k: pruned(v, fields[k]) for k, v in value.items() if k in fields}
    return value


def wrong_types(value: Any, fields: Any, path: str) -> list[str]:
    if isinstance(fields, list):
        items = value if isinstance(value, list) else []
        return [w for i, item in enumerate(items) for w in wrong_types(item, fields[0], f"{path}[{i}]")]
    if isinstance(fields, dict):
        items = value.items() if isinstance(value, dict) else []
        return [w for k, v in items if k in fields for w in wrong_types(v, fields[k], f"{path}.{k}")]
    if fields is ... or (isinstance(value, fields) and not (fields is int and isinstance(value, bool))):
        return []
    return [f"{path}: Invalid value: {value!r}: must be of type {fields.__name__}"]


def merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merged(target.get(key), value)
    return target


def json_patched(document: Any, operations: list[dict[str, Any]]) -> Any:
    document = copy.deepcopy(document)
    for operation in operations:
        *parents, last = [part.replace("~1", "/") for part in operation["path"].strip("/").split("/")]
        target = document
        try:
            for part in parents:
                target = target[int(part)] if isinstance(target, list) else target[part]
            key = int(last) if isinstance(target, list) and last != "-" else last
            if operation["op"] == "test":
                if target[key] != operation["value"]:
                    raise KeyError(key)
            elif operation["op"] == "remove":
                del target[key]
            elif isinstance(target, list):
                target.insert(len(target) if key == "-" else key, operation["value"])
            else:
                if operation["op"] == "replace":
                    target[key]
                target[key] = operation["value"]
        except (KeyError, IndexError, TypeError, ValueError):
            message = "the server rejected our request due to an error in our request"
            raise Refusal(422, "Invalid", message) from None
    return document


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Lists are atomic, as they are in KubeRay's CRDs."""
    if isinstance(value, dict) and value:
        return {p: v for key, item in value.items() for p, v in leaves(item, f"{path}.{key}").items()}
    return {path: value}


@dataclass
class FakeApiServer:
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    owners: dict[tuple[str, str, str], dict[str, tuple[str, str]]] = field(default_factory=dict)
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    outage: bool = False
    version: int = 100
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def handle(self, method: str, url: str, content_type: str, body: bytes) -> Any:
        split = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        with self.lock:
            self.requests.append((method, split.path))
            if self.outage:
                raise Refusal(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            if (answer := self.discovery(split.path)) is not None:
                return answer
            match = re.fullmatch(
                r"/(?:api|apis/(?P<group>[^/]+))/(?P<v>v1)(?:/namespaces/(?P<ns>[^/]+))?/(?P<plural>[a-z]+)"
                r"(?:/(?P<name>[^/]+))?(?P<status>/status)?",
                split.path.replace("/namespaces/", "/namespaces/", 1),
            )
            if re.fullmatch(r"/api/v1/namespaces(/[^/]+)?", split.path):
                match = re.fullmatch(
                    r"/api/(?P<v>v1)(?P<ns>)(?P<group>)/(?P<plural>namespaces)(?:/(?P<name>[^/]+))?(?P<status>/status)?",
                    split.path,
                )
            if match is None or match["plural"] not in KIND_OF:
                raise Refusal(404, "NotFound", "the server could not find the requested resource")
            verb = {"GET": "get" if match["name"] else "list", "PATCH": "patch", "POST": "create"}.get(method, "delete")
            if (verb, match["plural"]) in self.forbidden:
                user = 'User "system:serviceaccount:expertmesh:expertmesh"'
                where = f'in API group "{match["group"] or ""}" in the namespace "{match["ns"]}"'
                message = f'{match["plural"]} is forbidden: {user} cannot {verb} resource "{match["plural"]}" {where}'
                raise Refusal(403, "Forbidden", message)
            key = (match["plural"], match["ns"] or "", match["name"] or "")
            if verb == "list":
                return self.list(key[0], key[1], query)
            if verb == "create":
                return self.create(key, json.loads(body), query)
            if verb == "delete":
                gone = self.get(key)
                del self.objects[key]
                return gone
            if verb == "patch":
                return self.patch(key, content_type, body, query, status=bool(match["status"]))
            return self.get(key)

    def discovery(self, path: str) -> Any:
        path = path.rstrip("/")
        if path == "/version":
            return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        named = sorted(group for group in NAMESPACED if "/" in group)
        if path == "/apis":
            groups = [g.split("/")[0] for g in named]
            version = lambda g: {"groupVersion": f"{g}/v1", "version": "v1"}  # noqa: E731
            return {
                "kind": "APIGroupList",
                "groups": [{"name": g, "versions": [version(g)], "preferredVersion": version(g)} for g in groups],
            }
        for group in ["v1", *named]:
            if path == ("/api/v1" if group == "v1" else f"/apis/{group}"):
                return {"kind": "APIResourceList", "groupVersion": group, "resources": self.resources(group)}
        return None

    def resources(self, group: str) -> list[dict[str, Any]]:
        kinds = [(kind, True) for kind in NAMESPACED[group]] + [(k, False) for k in CLUSTER_WIDE.get(group, ())]
        return [
            {
                "name": plural_of(kind),
                "singularName": kind.lower(),
                "kind": kind,
                "namespaced": namespaced,
                "verbs": ["get", "list", "create", "patch", "delete"],
            }
            for kind, namespaced in kinds
        ]

    def get(self, key: tuple[str, str, str]) -> dict[str, Any]:
        if key not in self.objects:
            raise Refusal(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        return self.objects[key]

    def list(self, plural: str, namespace: str, query: dict[str, str]) -> dict[str, Any]:
        items = [o for (p, ns, _), o in self.objects.items() if p == plural and namespace in ("", ns)]
        for selector, read in (
            ("labelSelector", lambda o, k: o["metadata"].get("labels", {}).get(k)),
            ("fieldSelector", lambda o, k: o.get(k)),
        ):
            for term in filter(None, query.get(selector, "").split(",")):
                name, _, value = term.partition("=")
                items = [item for item in items if read(item, name) == value]
        kind = KIND_OF[plural]
        api_version = next(v for v, kinds in {**CLUSTER_WIDE, **NAMESPACED}.items() if kind in kinds or v == "v1")
        return {"kind": f"{kind}List", "apiVersion": api_version, "metadata": {}, "items": items}

    def create(self, key: tuple[str, str, str], body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        key = (key[0], key[1], body["metadata"]["name"])
        if key in self.objects:
            raise Refusal(409, "AlreadyExists", f'{key[0]} "{key[2]}" already exists')
        if body["kind"] in SPEC_FIELDS:
            body.pop("status", None)
        return self.store(key, {}, body, query, (query.get("fieldManager", "creator"), "Update"))

    def patch(
        self, key: tuple[str, str, str], content_type: str, body: bytes, query: dict[str, str], *, status: bool
    ) -> dict[str, Any]:
        ray = KIND_OF[key[0]] in SPEC_FIELDS
        accepted = {JSON_PATCH, MERGE_PATCH, APPLY} | (set() if ray else {STRATEGIC})
        if content_type not in accepted:
            message = "the body of the request was in an unknown format - accepted media types include: "
            raise Refusal(415, "UnsupportedMediaType", message + ", ".join(sorted(accepted)))
        document = yaml.safe_load(body)
        if isinstance(document, list) != (content_type == JSON_PATCH):
            raise Refusal(400, "BadRequest", "error decoding patch: json: cannot unmarshal into Go value")
        if content_type == APPLY:
            return self.apply(key, document, query)
        before = self.get(key)
        after = json_patched(before, document) if content_type == JSON_PATCH else merged(before, document)
        if ray:
            kept = "spec" if status else "status"
            after = {**after, kept: before[kept]} if kept in before else {k: v for k, v in after.items() if k != kept}
        return self.store(key, before, after, query, (query.get("fieldManager", "unknown"), "Update"))

    def apply(self, key: tuple[str, str, str], document: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        if "fieldManager" not in query:
            raise Refusal(400, "BadRequest", "fieldManager is required for apply patch")
        me = (query["fieldManager"], "Apply")
        before = self.objects.get(key, {})
        live, owners = leaves(before), self.owners.get(key, {})
        causes = [
            {
                "reason": "FieldManagerConflict",
                "message": f'conflict with "{owners[path][0]}" using {document["apiVersion"]}',
                "field": path,
            }
            for path, value in leaves(document).items()
            if path in owners and owners[path] != me and live.get(path) != value
        ]
        if causes and query.get("force") not in ("true", "True"):
            said = "; ".join(f"{cause['message']}: {cause['field']}" for cause in causes)
            raise Refusal(409, "Conflict", f"Apply failed with {len(causes)} conflicts: {said}", causes)
        return self.store(key, before, merged(before, document), query, me)

    def store(
        self,
        key: tuple[str, str, str],
        before: dict[str, Any],
        after: dict[str, Any],
        query: dict[str, str],
        manager: tuple[str, str],
    ) -> dict[str, Any]:
        after = copy.deepcopy(after)
        after["metadata"] = dict(after["metadata"])
        stated = after["metadata"].get("resourceVersion")
        if before and stated != before["metadata"]["resourceVersion"]:
            message = "the object has been modified; please apply your changes to the latest version and try again"
            raise Refusal(409, "Conflict", message)
        fields = SPEC_FIELDS.get(KIND_OF[key[0]])
        if fields is not None:
            unknown = unknown_fields(after["spec"], fields, "spec")
            if unknown and query.get("fieldValidation") == "Strict":
                message = ", ".join(f'unknown field "{path}"' for path in unknown)
                raise Refusal(400, "BadRequest", f"strict decoding error: {message}")
            if wrong := wrong_types(after["spec"], fields, "spec"):
                raise Refusal(422, "Invalid", f'{KIND_OF[key[0]]} "{key[2]}" is invalid: {"; ".join(wrong)}')
            after["spec"] = pruned(after["spec"], fields)
        after["metadata"].setdefault("uid", str(uuid.uuid4()))
        after["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        if key[1]:
            after["metadata"]["namespace"] = key[1]
        if query.get("dryRun") == "All":
            return after
        self.version += 1
        after["metadata"]["resourceVersion"] = str(self.version)
        old, owners = leaves(before), self.owners.setdefault(key, {})
        for path, value in leaves({k: v for k, v in after.items() if k != "metadata"}).items():
            if old.get(path) != value or manager[1] == "Apply":
                owners[path] = manager
        self.objects[key] = after
        return after


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content_type = (self.headers.get("Content-Type") or "").split(";")[0]
        code, body = 200, None
        try:
            body = self.server.fake.handle(self.command, self.path, content_type, self.rfile.read(length))  # type: ignore[attr-defined]
        except Refusal as refusal:
            code = refusal.code
            body = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": refusal.message,
                "reason": refusal.reason,
                "code": code,
                "details": {"causes": refusal.causes},
            }
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        pass


@dataclass
class Cluster:
    """kubeconfig: of the server. fake: its inside, None for a real one."""

    kubeconfig: Path
    namespace: str
    fake: FakeApiServer | None
    api_client: client.ApiClient

    def create(self, kind: str, name: str, spec: dict[str, Any], status: dict[str, Any] | None = None) -> None:
        """A Ray object, and its status as the operator would write it."""
        plural = plural_of(kind)
        body = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        api = client.CustomObjectsApi(self.api_client)
        api.create_namespaced_custom_object("ray.io", "v1", self.namespace, plural, body)
        if status is not None:
            patching = client.ApiClient(self.api_client.configuration)
            patching.set_default_header("Content-Type", MERGE_PATCH)
            client.CustomObjectsApi(patching).patch_namespaced_custom_object_status(
                "ray.io", "v1", self.namespace, plural, name, {"status": status}
            )

    def get(self, kind: str, name: str) -> dict[str, Any]:
        api = client.CustomObjectsApi(self.api_client)
        return api.get_namespaced_custom_object("ray.io", "v1", self.namespace, plural_of(kind), name)


def write_kubeconfig(path: Path, server: str) -> Path:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": server}}],
        "users": [{"name": "fake", "user": {"token": "not-a-secret"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
    }
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kubernetes)])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    if request.param == "real":
        kubeconfig = os.environ.get("KUBECONFIG")
        if not kubeconfig:
            pytest.skip("KUBECONFIG names no cluster to try this on")
        yield from real_cluster(Path(kubeconfig))
        return
    fake = FakeApiServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.fake = fake  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    path = write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{server.server_port}")
    with client.ApiClient(configuration(path)) as api_client:
        yield Cluster(kubeconfig=path, namespace="mesh-test", fake=fake, api_client=api_client)
    server.shutdown()
    server.server_close()
    thread.join()


def configuration(kubeconfig: Path) -> client.Configuration:
    loaded = client.Configuration()
    config.load_kube_config(config_file=str(kubeconfig), client_configuration=loaded)
    return loaded


def real_cluster(kubeconfig: Path) -> Iterator[Cluster]:
    with client.ApiClient(configuration(kubeconfig)) as api_client:
        namespace = f"mesh-test-{uuid.uuid4().hex[:8]}"
        core = client.CoreV1Api(api_client)
        core.create_namespace({"metadata": {"name": namespace}})
        with contextlib.suppress(client.ApiException):  # a controller makes it, where one runs, and pods need it
            core.create_namespaced_service_account(namespace, {"metadata": {"name": "default"}})
        try:
            yield Cluster(kubeconfig=kubeconfig, namespace=namespace, fake=None, api_client=api_client)
        finally:
            core.delete_namespace(namespace)


@pytest.fixture
def fake(cluster: Cluster) -> FakeApiServer:
    if cluster.fake is None:
        pytest.skip("bends the server's will, which a real one does not allow")
    return cluster.fake


@pytest.fixture
def ray_service(cluster: Cluster) -> Callable[..., None]:
    """Makes RayService `mesh` and the RayCluster behind it."""

    def make(*, autoscaling: bool = False, clusters: tuple[str, ...] = ("mesh-abcde",), **replicas: int) -> None:
        pod = {"spec": {"containers": [{"name": "ray", "image": "expertmesh:0.1.0-cpu"}]}}
        groups = [
            {
                "groupName": name,
                "replicas": count,
                "minReplicas": count,
                "maxReplicas": count,
                "numOfHosts": 1,
                "rayStartParams": {},
                "template": pod,
            }
            for name, count in (replicas or {"engine": 1, "experts": 2}).items()
        ]
        spec = {
            "rayVersion": "2.60.0",
            "enableInTreeAutoscaling": autoscaling,
            "headGroupSpec": {"rayStartParams": {}, "template": pod},
            "workerGroupSpecs": groups,
        }
        names = [{"rayClusterName": name} for name in clusters]
        status: dict[str, Any] = {"serviceStatus": "Running"}
        status |= dict(zip(("activeServiceStatus", "pendingServiceStatus"), names, strict=False))
        cluster.create("RayService", "mesh", {"serveConfigV2": "", "rayClusterConfig": spec}, status)
        for name in clusters:
            cluster.create("RayCluster", name, spec)

    return make
