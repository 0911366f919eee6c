"""Are the Python packages here, in versions that work together?"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from cluster.doctor.finding import Finding

PROJECT = "expertmesh"


def check_packages(requirements: list[str] | None = None) -> Iterator[Finding]:
    """Every requirement of the installed project against what is installed; `requirements` replaces them."""
    if requirements is None:
        try:
            requirements = metadata.requires(PROJECT) or []
        except metadata.PackageNotFoundError:
            yield Finding(
                check="packages",
                status="warn",
                found=f"{PROJECT} runs from a folder, not installed: versions cannot be compared",
                todo="pip install -e . in the clone",
            )
            return
    wrong = [problem for text in requirements if (problem := _problem(Requirement(text)))]
    for problem in wrong:
        yield Finding(check="packages", status="fail", found=problem, todo="pip install -e . in the clone")
    if not wrong:
        yield Finding(check="packages", status="ok", found=f"{len(requirements)} requirements are met")


def _problem(requirement: Requirement) -> str | None:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed; {requirement.specifier or 'any version'} is needed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}; {requirement.specifier} is needed"
