"""What the API server refuses, in words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic.exceptions import ResourceNotFoundError
from urllib3.exceptions import HTTPError

from experts.errors import MeshError


class KubernetesError(MeshError):
    """The API server refused a call or could not be reached. `status` is its HTTP status, 0 where none came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


_ADVICE = {
    401: "the credentials were not accepted; log in again, or give another --context",
    403: "this account may not do that; deploy/base/rbac.yaml holds the rights that are needed",
    404: "there is no such object; check --namespace and --name, and that the KubeRay CRDs are installed",
    415: "the server does not take this content type",
    429: "the server asks to slow down; try again later",
}


def status_of(error: ApiException) -> dict[str, Any]:
    """The Status object in the answer; empty where the answer is none (a proxy's error page, say)."""
    try:
        document = json.loads(error.body or "")
    except (TypeError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


@contextmanager
def readable(doing: str) -> Iterator[None]:
    """Turns what the client raises into KubernetesError; `doing` says what was tried, e.g. "reading rayservice x"."""
    try:
        yield
    except ApiException as error:
        message = status_of(error).get("message") or error.reason or "no reason given"
        advice = _ADVICE.get(error.status or 0)
        if advice is None and (error.status or 0) >= 500:
            advice = "the API server is in trouble; nothing is lost, try again"
        tail = f"; {advice}" if advice else ""
        raise KubernetesError(f"{doing}: {message} (HTTP {error.status}){tail}", error.status or 0) from error
    except ResourceNotFoundError as error:
        raise KubernetesError(f"{doing}: the cluster does not know this kind; install its CRD first", 404) from error
    except HTTPError as error:
        raise KubernetesError(
            f"{doing}: the API server cannot be reached: {getattr(error, 'reason', error)}"
        ) from error
