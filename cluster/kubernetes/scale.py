"""Changes how many pods a worker group has.

KubeRay does not carry `replicas` from a RayService to the RayCluster that it made, and overwrites the RayCluster's with
the RayService's at the next other change: so both are written, the RayService first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cluster.kubernetes.errors import KubernetesError
from cluster.kubernetes.ray_objects import (
    Document,
    Patch,
    RayObjects,
    cluster_names,
    cluster_spec,
    worker_groups,
)
from experts.errors import ConfigError

_T = TypeVar("_T")
_ATTEMPTS = 5
_CONFLICT = (409, 422)  # a stale version; a `test` that failed, because the list changed since it was read


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """One object that was written: `before` and `after` are the replicas of the groups that were asked for."""

    kind: str
    name: str
    before: Mapping[str, int]
    after: Mapping[str, int]


def scale(
    objects: RayObjects,
    name: str,
    replicas: Mapping[str, int],
    *,
    remove_pods: Sequence[str] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> list[Scaled]:
    """Set `replicas` of worker groups of RayService `name`; the bounds move where they would exclude it.

    remove_pods: pods that shall go when a single group shrinks; without it the operator chooses. The caller clears the
    list with `clear_removed` once they are gone, because the operator never does.

    Safe to repeat. Raises ConfigError for a group that is not there or where Ray's autoscaler owns `replicas`, and
    KubernetesError.
    """
    for group, count in replicas.items():
        if count < 0:
            raise ConfigError(f"{group}={count}: a worker group cannot have fewer than 0 pods")
    if remove_pods and len(replicas) != 1:
        raise ConfigError("pods to remove belong to one worker group; scale one group at a time")
    service = objects.service(name)
    refuse_second_owner(service)

    done = [_write(objects, "RayService", name, replicas, (), sleep)]
    for cluster in cluster_names(service):
        try:
            done.append(_write(objects, "RayCluster", cluster, replicas, remove_pods, sleep))
        except KubernetesError as error:
            raise KubernetesError(
                f"RayService {name} is written, RayCluster {cluster} is not: {error}; run the same command again",
                error.status,
            ) from error
    return done


def clear_removed(objects: RayObjects, name: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Empty `scaleStrategy.workersToDelete` of every RayCluster behind RayService `name`."""
    for cluster in cluster_names(objects.service(name)):
        _retry(partial(_clear, objects, cluster), sleep)


def _write(
    objects: RayObjects,
    kind: str,
    name: str,
    replicas: Mapping[str, int],
    remove_pods: Sequence[str],
    sleep: Callable[[float], None],
) -> Scaled:
    read, patch = (
        (objects.service, objects.patch_service) if kind == "RayService" else (objects.cluster, objects.patch_cluster)
    )

    def attempt() -> Scaled:
        document = read(name)
        before = _replicas(document, replicas)
        operations = scale_patch(document, replicas, remove_pods=remove_pods)
        after = _replicas(patch(name, operations), replicas) if operations else before
        return Scaled(kind=kind, name=name, before=before, after=after)

    return _retry(attempt, sleep)


def scale_patch(document: Document, replicas: Mapping[str, int], *, remove_pods: Sequence[str] = ()) -> Patch:
    """The JSON patch that sets `replicas` in a RayService or RayCluster as it was read; empty where nothing changes.

    A merge patch would have to carry the whole list. Each group's index is guarded by a `test` of its name, so that a
    list that has changed since is refused and not mis-patched.
    """
    root = "/spec/rayClusterConfig" if "rayClusterConfig" in document["spec"] else "/spec"
    groups = list(worker_groups(document))
    names = [group["groupName"] for group in groups]
    patch: Patch = []
    for name, count in replicas.items():
        if name not in names:
            raise ConfigError(f"no worker group {name!r}; there are {', '.join(names) or 'none'}")
        index = names.index(name)
        group, at = groups[index], f"{root}/workerGroupSpecs/{index}"
        changes: Patch = []
        wanted = {
            "replicas": count,
            "minReplicas": min(count, group.get("minReplicas", 0)),
            "maxReplicas": max(count, group.get("maxReplicas", count)),
        }
        for key, value in wanted.items():
            if group.get(key) != value:
                changes.append({"op": "add", "path": f"{at}/{key}", "value": value})
        if remove_pods:
            # One patch with replicas: alone, the operator would put other pods in their place.
            strategy = {**(group.get("scaleStrategy") or {}), "workersToDelete": list(remove_pods)}
            changes.append({"op": "add", "path": f"{at}/scaleStrategy", "value": strategy})
        if changes:
            patch += [{"op": "test", "path": f"{at}/groupName", "value": name}, *changes]
    return patch


def _clear(objects: RayObjects, cluster: str) -> None:
    patch: Patch = []
    for index, group in enumerate(worker_groups(objects.cluster(cluster))):
        if (group.get("scaleStrategy") or {}).get("workersToDelete"):
            at = f"/spec/workerGroupSpecs/{index}"
            patch.append({"op": "test", "path": f"{at}/groupName", "value": group["groupName"]})
            patch.append({"op": "remove", "path": f"{at}/scaleStrategy/workersToDelete"})
    if patch:
        objects.patch_cluster(cluster, patch)


def refuse_second_owner(service: Document) -> None:
    """Raise ConfigError where Ray's autoscaler owns `replicas`."""
    if cluster_spec(service).get("enableInTreeAutoscaling"):
        raise ConfigError(
            f"RayService {service['metadata']['name']} has enableInTreeAutoscaling: Ray's autoscaler owns `replicas` "
            "and would undo this; change min_replicas and max_replicas of the autoscaling section instead"
        )


def _replicas(document: Document, of: Mapping[str, int]) -> dict[str, int]:
    return {g["groupName"]: g.get("replicas", 0) for g in worker_groups(document) if g["groupName"] in of}


def _retry(attempt: Callable[[], _T], sleep: Callable[[float], None]) -> _T:
    for turn in range(_ATTEMPTS):
        try:
            return attempt()
        except KubernetesError as error:
            if error.status not in _CONFLICT or turn == _ATTEMPTS - 1:
                raise
            sleep(0.1 * 2**turn)
    raise AssertionError("the last turn returns or raises")
