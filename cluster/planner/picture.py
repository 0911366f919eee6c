"""Draws a plan: nodes, their GPUs, and what each GPU holds."""

from __future__ import annotations

from math import ceil, sqrt
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from cluster.planner.plan import Plan
from experts.errors import ConfigError

_CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}
_EXPERTS, _WEIGHTS, _CACHE, _FREE, _FRAME = "#2a78b5", "#7a3e9d", "#e08a1e", "#f1f1f1", "#555555"
_GIB = 2**30
_GPUS_A_ROW = 4


def draw(plan: Plan, path: Path) -> None:
    """Write a .svg or .png. Raises ConfigError for another suffix or a path that cannot be written."""
    canvas = _CANVASES.get(path.suffix.lower())
    if canvas is None:
        raise ConfigError(f"--picture {path}: the name must end in {' or '.join(_CANVASES)}")
    figure = _figure(plan)
    canvas(figure)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"--picture {path}: cannot be written: {error.strerror}") from None


def _figure(plan: Plan) -> Figure:
    request = plan.request
    per_row = min(request.gpus_per_node, _GPUS_A_ROW)
    gpu_rows = ceil(request.gpus_per_node / per_row)
    columns = min(request.nodes, max(1, round(sqrt(request.nodes * 1.6 * gpu_rows / per_row))))
    rows = ceil(request.nodes / columns)
    node_width, node_height = per_row + 0.5, gpu_rows * 1.25 + 0.75
    width, height = columns * node_width, rows * node_height
    scale = min(1.0, 22 / width)
    size = (max(7.5, width * scale), max(2.6, height * scale) + 1.7)
    figure = Figure(figsize=size)
    top = 1 - 1.0 / size[1]
    axes = figure.add_axes((0.02, 0.6 / size[1], 0.96, top - 0.6 / size[1]))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    font = max(3.0, 8 * min(scale, 1.0))
    for node in range(request.nodes):
        left, upper = (node % columns) * node_width + 0.1, (node // columns) * node_height + 0.1
        frame = FancyBboxPatch(
            (left, upper), node_width - 0.2, node_height - 0.2, boxstyle="round,pad=0,rounding_size=0.1"
        )
        frame.set(facecolor="white", edgecolor=_FRAME, linewidth=1.2)
        axes.add_patch(frame)
        axes.text(left + 0.15, upper + 0.3, f"node {node}", fontsize=font + 1, va="center", color=_FRAME)
        for slot in range(request.gpus_per_node):
            x, y = left + 0.15 + slot % per_row, upper + 0.5 + (slot // per_row) * 1.25
            _gpu(axes, plan, node * request.gpus_per_node + slot, x, y, font)
    figure.text(0.02, 1 - 0.35 / size[1], _title(plan), fontsize=11, weight="bold", va="center")
    figure.text(0.02, 1 - 0.7 / size[1], _subtitle(plan), fontsize=9, va="center", color=_FRAME)
    legend = [
        Patch(color=_EXPERTS, label="routed experts"),
        Patch(color=_WEIGHTS, label="attention and all else"),
        Patch(color=_CACHE, label="KV cache"),
        Patch(facecolor=_FREE, edgecolor=_FRAME, label="free"),
    ]
    figure.legend(handles=legend, loc="lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _gpu(axes, plan: Plan, gpu: int, x: float, y: float, font: float) -> None:  # type: ignore[no-untyped-def]
    """One card as a box filled from below by what it holds, in proportion to its whole memory."""
    split, memory, whole = plan.split, plan.memory, plan.request.gpu.memory_bytes
    if gpu < split.expert_gpus:
        copy = f".{gpu // split.groups}" if split.group_replicas > 1 else ""
        name, parts = f"group {gpu % split.groups}{copy}", [(memory.expert_weights, _EXPERTS)]
    else:
        cache = plan.sequences * plan.request.context * memory.kv_bytes_per_token
        name = f"engine {gpu - split.expert_gpus}"
        parts = [(memory.engine_weights, _WEIGHTS), (cache, _CACHE)]
    axes.add_patch(Rectangle((x + 0.05, y + 0.25), 0.8, 0.8, facecolor=_FREE, edgecolor=_FRAME, linewidth=0.6))
    bottom = y + 1.05
    for size, colour in parts:
        tall = 0.8 * size / whole
        axes.add_patch(Rectangle((x + 0.05, bottom - tall), 0.8, tall, facecolor=colour, linewidth=0))
        bottom -= tall
    axes.text(x + 0.45, y + 0.13, name, fontsize=font, ha="center", va="center")


def _title(plan: Plan) -> str:
    request = plan.request
    rumour = " (as rumoured)" if request.model.rumoured else ""
    return f"{request.model.name}{rumour} on {request.nodes} x {request.gpus_per_node} {request.gpu.name}"


def _subtitle(plan: Plan) -> str:
    memory, split = plan.memory, plan.split
    return (
        f"{_several(split.groups, 'group')} of {memory.expert_weights / _GIB:.1f} GiB in {plan.scheme.name}, "
        f"{_several(split.engine_gpus, 'engine')}, {plan.traffic.nodes:.2f} nodes a token, "
        f"about {plan.tokens_per_second:,.0f} tokens/s"
    )


def _several(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
