from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.planner.picture import draw
from cluster.planner.plan import PlanRequest, make_plan
from experts.errors import ConfigError

RequestFor = Callable[..., PlanRequest]


def test_svg_and_png_are_written(request_for: RequestFor, tmp_path: Path) -> None:
    plan = make_plan(request_for("deepseek-v3", "h100-80g", 4))
    draw(plan, tmp_path / "plan.svg")
    assert ElementTree.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")
    # Text is drawn as shapes; matplotlib leaves it beside them as comments.
    svg = (tmp_path / "plan.svg").read_text()
    assert svg.count("<!-- group ") == plan.split.expert_gpus
    assert svg.count("<!-- engine ") == plan.split.engine_gpus
    assert svg.count("<!-- node ") == 4
    draw(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_another_suffix_or_place_is_refused(request_for: RequestFor, tmp_path: Path) -> None:
    plan = make_plan(request_for("mixtral-8x7b", "h100-80g", 1))
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        draw(plan, tmp_path / "plan.pdf")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(plan, tmp_path / "missing" / "plan.png")
