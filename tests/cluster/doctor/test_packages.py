from __future__ import annotations

from importlib import metadata

import pytest

from cluster.doctor.packages import check_packages


def test_what_is_missing_or_too_old_is_named() -> None:
    numpy = metadata.version("numpy")
    findings = [*check_packages(["numpy>=1", "numpy<0.1", "no-such-package>=2", "absent; platform_system == 'Plan9'"])]
    assert [finding.status for finding in findings] == ["fail", "fail"]
    assert findings[0].found == f"numpy is {numpy}; <0.1 is needed"
    assert findings[1].found.startswith("no-such-package is not installed; >=2")
    assert all(finding.todo for finding in findings)


def test_requirements_that_are_met() -> None:
    (finding,) = check_packages(["numpy>=1", "torch"])
    assert (finding.status, finding.found) == ("ok", "2 requirements are met")


def test_running_from_a_folder_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.doctor.packages.PROJECT", "expertmesh-nowhere")
    (finding,) = check_packages()
    assert finding.status == "warn"
