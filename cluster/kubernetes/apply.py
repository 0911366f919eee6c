"""Server-side apply of manifests, which keeps the pods that were scaled."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient

from cluster.kubernetes.errors import KubernetesError, readable, status_of
from cluster.kubernetes.ray_objects import FIELD_MANAGER, TIMEOUT_S, Document, RayObjects, worker_groups

_COUNTS = ("replicas", "minReplicas", "maxReplicas")


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """kept: worker groups whose live `replicas` were kept, because they differ from the manifest's."""

    kind: str
    name: str
    namespace: str
    kept: tuple[str, ...] = ()


def apply(
    api_client: client.ApiClient,
    manifests: Sequence[Document],
    *,
    namespace: str,
    force: bool = False,
    reset_replicas: bool = False,
    dry_run: bool = False,
) -> Iterator[Applied]:
    """Apply each object, in their order, and yield it as it stands.

    namespace: for namespaced objects that name none
    force: take fields that another manager has set; without it they are an error that names manager and fields
    reset_replicas: write the manifest's `replicas` over those that `scale` has set

    Raises KubernetesError at the first object that is refused; those before it stay.
    """
    with tempfile.TemporaryDirectory() as cache:
        # Its discovery cache lies under a guessable name in a directory of everybody, unless told otherwise.
        with readable("discovering the cluster's kinds"):
            dynamic = DynamicClient(api_client, cache_file=str(Path(cache) / "discovery.json"))
        for manifest in manifests:
            yield _apply(api_client, dynamic, manifest, namespace, force, reset_replicas, dry_run)


def _apply(
    api_client: client.ApiClient,
    dynamic: DynamicClient,
    manifest: Document,
    namespace: str,
    force: bool,
    reset_replicas: bool,
    dry_run: bool,
) -> Applied:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    doing = f"applying {kind}/{name}"
    with readable(doing):
        resource = dynamic.resources.get(api_version=manifest["apiVersion"], kind=kind)
    where = manifest["metadata"].get("namespace", namespace) if resource.namespaced else ""
    kept: tuple[str, ...] = ()
    if kind == "RayService" and not reset_replicas:
        manifest, kept = _with_live_replicas(manifest, RayObjects(api_client, where))

    def send(force_conflicts: bool) -> None:
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        dynamic.server_side_apply(
            resource,
            body=manifest,
            name=name,
            namespace=where or None,
            field_manager=FIELD_MANAGER,
            force_conflicts=force_conflicts,
            query_params=[("fieldValidation", "Strict")],
            _request_timeout=TIMEOUT_S,
            **options,
        )

    with readable(doing):
        try:
            send(force)
        except ApiException as error:
            if error.status != 409 or force:
                raise
            others = _other_managers(error)
            if others:
                raise KubernetesError(f"{doing}: {'; '.join(others)}; --force takes these fields over", 409) from error
            send(True)  # our own `scale` set them
    return Applied(kind=kind, name=name, namespace=where, kept=kept)


def _with_live_replicas(manifest: Document, objects: RayObjects) -> tuple[Document, tuple[str, ...]]:
    try:
        live = objects.service(manifest["metadata"]["name"])
    except KubernetesError as error:
        if error.status == 404:
            return manifest, ()
        raise
    manifest = copy.deepcopy(manifest)
    standing = {group["groupName"]: group for group in worker_groups(live)}
    kept = []
    for group in worker_groups(manifest):
        counts = {key: standing.get(group["groupName"], {}).get(key, group.get(key)) for key in _COUNTS}
        if any(group.get(key) != value for key, value in counts.items()):
            group.update(counts)
            kept.append(group["groupName"])
    return manifest, tuple(kept)


def _other_managers(error: ApiException) -> list[str]:
    """The conflicts with managers other than ourselves, in the server's words; a 409 of another kind is one too."""
    status = status_of(error)
    causes = (status.get("details") or {}).get("causes") or []
    conflicts = [cause for cause in causes if cause.get("reason") == "FieldManagerConflict"]
    if not conflicts:
        return [str(status.get("message") or error.reason)]
    return [f"{c['message']}: {c['field']}" for c in conflicts if f'"{FIELD_MANAGER}"' not in c["message"]]
