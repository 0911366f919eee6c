"""Manifests from a file, from standard input, or from a directory with a kustomization."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from experts.errors import ConfigError

_BUILDERS = (("kustomize", "build"), ("kubectl", "kustomize"))
# What others refer to comes first; the RayService last, when everything that its pods need is there.
_ORDER = ("Namespace", "CustomResourceDefinition", "ServiceAccount", "Role", "ClusterRole")


def read_manifests(path: str) -> list[dict[str, Any]]:
    """Objects in the order in which they are to be applied. Raises ConfigError."""
    if path == "-":
        return _parse(sys.stdin.read(), "standard input")
    location = Path(path)
    if location.is_dir():
        return _parse(_build(location), path)
    try:
        return _parse(location.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _build(directory: Path) -> str:
    for builder in _BUILDERS:
        if shutil.which(builder[0]):
            result = subprocess.run([*builder, str(directory)], capture_output=True, text=True, check=False)
            if result.returncode:
                raise ConfigError(f"{directory}: {' '.join(builder)}: {result.stderr.strip()}")
            return result.stdout
    raise ConfigError(f"{directory}: neither kustomize nor kubectl is installed; build it elsewhere and apply the file")


def _parse(text: str, origin: str) -> list[dict[str, Any]]:
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if not documents:
        raise ConfigError(f"{origin}: no object in it")
    for number, document in enumerate(documents, 1):
        named = isinstance(document, dict) and isinstance(document.get("metadata"), dict)
        if not (named and document.get("apiVersion") and document.get("kind") and document["metadata"].get("name")):
            raise ConfigError(f"{origin}: document {number} lacks apiVersion, kind or metadata.name")
    return sorted(documents, key=_rank)


def _rank(document: dict[str, Any]) -> int:
    kind = document["kind"]
    if kind in _ORDER:
        return _ORDER.index(kind)
    return len(_ORDER) + (kind in ("RayService", "RayCluster"))
