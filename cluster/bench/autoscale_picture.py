"""Draws an autoscaling run: replicas, queue and latency over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_ENGINE, _GROUPS, _FIRST, _WHOLE = "#2a78b5", "#7a3e9d", "#e08a1e", "#555555"
# Beside the axes: inside there is always a line below it.
_LEGEND = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "fontsize": 8, "frameon": False}


class Answered(Protocol):
    """A request; times in seconds since the run began."""

    @property
    def sent(self) -> float: ...
    @property
    def first_token(self) -> float: ...
    @property
    def done(self) -> float: ...
    @property
    def error(self) -> str: ...


def draw(
    samples: Sequence[dict[str, Any]], requests: Sequence[Answered], phases: Sequence[tuple[float, str]], path: Path
) -> None:
    """Write a PNG.

    samples: dicts of `at` (seconds), `engines`, `groups` (replicas of each), `in_flight` and `waiting` requests
    phases:  (seconds, name) of each phase's beginning
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    replicas, queue, latency = figure.subplots(3, 1, sharex=True)
    times = [sample["at"] for sample in samples]

    replicas.step(times, [s["engines"] for s in samples], where="post", color=_ENGINE, lw=2.2, label="engine")
    num_groups = len(samples[0]["groups"])
    for group in range(num_groups):
        # A little apart, so that lines of equal height are all seen.
        counts = [sample["groups"][group] + 0.04 * (group + 1) for sample in samples]
        shade = 1.0 - 0.5 * group / num_groups
        replicas.step(times, counts, where="post", color=_GROUPS, alpha=shade, lw=1.6, label=f"expert group {group}")
    replicas.set_ylabel("replicas")
    replicas.set_ylim(bottom=0)
    replicas.yaxis.get_major_locator().set_params(integer=True)
    replicas.legend(**_LEGEND)

    queue.fill_between(times, [s["in_flight"] for s in samples], step="post", color=_ENGINE, alpha=0.25)
    queue.step(times, [s["in_flight"] for s in samples], where="post", color=_ENGINE, label="in flight")
    queue.step(times, [s["waiting"] for s in samples], where="post", color=_FIRST, label="waiting for a first token")
    queue.set_ylabel("requests")
    queue.legend(**_LEGEND)

    good = [request for request in requests if not request.error]
    latency.scatter(
        [r.sent for r in good], [r.done - r.sent for r in good], s=8, color=_WHOLE, alpha=0.6, label="whole answer"
    )
    latency.scatter(
        [r.sent for r in good], [r.first_token - r.sent for r in good], s=8, color=_FIRST, label="first token"
    )
    for request in requests:
        if request.error:
            latency.axvline(request.sent, color="red", lw=1)
    latency.set_ylabel("seconds")
    latency.set_yscale("log")
    latency.set_xlabel("seconds since the load began")
    latency.legend(**_LEGEND)

    for axes in (replicas, queue, latency):
        axes.grid(alpha=0.25)
        for start, _ in phases:
            axes.axvline(start, color="black", lw=0.8, ls=":")
    for start, name in phases:
        replicas.annotate(name, (start, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
                          textcoords="offset points", fontsize=9)  # fmt: skip
    failed = sum(bool(request.error) for request in requests)
    figure.suptitle(f"{len(requests)} requests, {failed} failed", fontsize=11)
    figure.savefig(path, dpi=80)
