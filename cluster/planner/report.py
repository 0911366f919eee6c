"""A plan as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cluster.planner.advice import cheapest_lift
from cluster.planner.assumptions import ASSUMPTIONS
from cluster.planner.caveats import warnings_of
from cluster.planner.cost import dollars_per_million_tokens
from cluster.planner.plan import Plan
from cluster.planner.roofline import StepTime

_GIB = 2**30


def print_report(plan: Plan, price_per_gpu_hour: float | None, console: Console) -> None:
    """Print parameters, memory, placement, traffic, step times, what binds and what would lift it."""
    for table in (_parameters(plan), _memory(plan), _placement(plan), _traffic(plan), _steps(plan)):
        console.print(table)
    console.print(_verdict(plan, price_per_gpu_hour), highlight=False)
    if plan.request.model.note:
        console.print(f"note {plan.request.model.note}", highlight=False)
    for warning in warnings_of(plan):
        console.print(f"[yellow]warning[/yellow] {warning}", highlight=False)
    lift = cheapest_lift(plan)
    advice = f"cheapest change that lifts it: {lift}" if lift else "no single change that the planner tries lifts it"
    console.print(f"bound by [bold]{plan.binding_constraint}[/bold]; {advice}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns), min_width=64)
    table.add_column(columns[0] if columns else "")
    for column in columns[1:] or ("",):
        table.add_column(column, justify="right")
    return table


def _parameters(plan: Plan) -> Table:
    request, counts = plan.request, plan.counts
    rumour = ", as rumoured" if request.model.rumoured else ""
    table = _table(f"{request.model.name}{rumour}: parameters", "part", "billions")
    for name in ("routed_experts", "shared_experts", "dense_mlp", "attention", "gates", "norms"):
        table.add_row(name.replace("_", " "), _billions(getattr(counts, name)))
    table.add_row("input embedding", _billions(counts.input_embedding))
    table.add_row("output head", _billions(counts.output_head) if counts.output_head else "tied")
    table.add_section()
    table.add_row("total", _billions(counts.total))
    counted = "counted" if counts.embedding_is_active else "not counted"
    table.add_row(f"active, input embedding {counted}", _billions(counts.active))
    return table


def _memory(plan: Plan) -> Table:
    memory, context = plan.memory, plan.request.context
    used = plan.sequences * context * memory.kv_bytes_per_token
    share = f"{ASSUMPTIONS.gpu_memory_utilization:.0%} of {plan.request.gpu.name}"
    table = _table(f"Memory of one GPU: {memory.usable / _GIB:.1f} GiB usable, {share}", "holds", "GiB")
    table.add_row(f"expert group: experts in {plan.scheme.name}", _gib(memory.expert_weights))
    table.add_row("engine: attention and all else", _gib(memory.engine_weights))
    table.add_row("engine: room for the KV cache", _gib(memory.kv_cache))
    table.add_row(f"engine: KV cache of {plan.sequences} x {context} tokens", _gib(used))
    table.add_section()
    table.add_row("all routed experts, once", _gib(plan.expert_bytes))
    table.add_row("KV cache of one token", f"{memory.kv_bytes_per_token / 1024:.1f} KiB")
    return table


def _placement(plan: Plan) -> Table:
    request, split = plan.request, plan.split
    table = _table(f"Placement on {request.nodes} x {request.gpus_per_node} {request.gpu.name}")
    copies = f" x {split.group_replicas} replicas" if split.group_replicas > 1 else ""
    table.add_row("expert groups, one a GPU", f"{split.groups}{copies}")
    table.add_row("engines, one a GPU", str(split.engine_gpus))
    table.add_row("expert groups on each node", " ".join(map(str, split.groups_on_node())))
    layers = request.model.architecture.num_moe_layers
    table.add_row("slots of a group", f"{split.slots_per_group} a layer, {split.slots_per_group * layers} in all")
    table.add_row("redundant experts a layer", str(split.num_redundant_experts))
    table.add_row("pods", f"{split.expert_gpus // split.pod_gpus} + {split.engine_gpus // split.pod_gpus}")
    table.add_row("GPUs of a pod", str(split.pod_gpus))
    return table


def _traffic(plan: Plan) -> Table:
    traffic, layers = plan.traffic, plan.request.model.architecture.num_moe_layers
    table = _table("Traffic of one token and MoE layer")
    table.add_row("nodes touched, expected", f"{traffic.nodes:.2f}")
    table.add_row("of them other than the engine's", f"{traffic.remote_nodes:.2f}")
    table.add_row("dispatched", f"{traffic.dispatch_bytes / 1024:.1f} KiB")
    table.add_row("combined", f"{traffic.combine_bytes / 1024:.1f} KiB")
    away = (plan.decode.dispatch_latency + plan.decode.dispatch_bandwidth) / layers
    table.add_row(f"time a layer, {plan.sequences} tokens an engine", f"{away * 1e3:.2f} ms")
    return table


def _steps(plan: Plan) -> Table:
    table = _table("Time of one step, ms, by what bounds it", "", "decode", "prefill")
    for name, seconds in plan.decode.parts().items():
        table.add_row(name.replace("_", " "), f"{seconds * 1e3:.1f}", f"{_part(plan.prefill, name) * 1e3:.1f}")
    table.add_section()
    table.add_row("total", f"{plan.decode.total * 1e3:.1f}", f"{plan.prefill.total * 1e3:.1f}")
    return table


def _part(step: StepTime, name: str) -> float:
    return step.parts()[name]


def _verdict(plan: Plan, price_per_gpu_hour: float | None) -> str:
    cost = dollars_per_million_tokens(plan, price_per_gpu_hour)
    priced = "" if cost is None else f", ${cost:.2f} a million output tokens"
    return (
        f"[green]fits[/green]: {plan.tokens_per_second:,.0f} output tokens/s, "
        f"{plan.decode.total * 1e3:.0f} ms a token, "
        f"{plan.prefill_tokens_per_second:,.0f} prompt tokens/s{priced}"
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:,.3f}"


def _gib(count: int) -> str:
    return f"{count / _GIB:,.1f}"
