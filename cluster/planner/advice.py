"""What would make a plan fit, or faster: every single change is planned, the cheapest is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.planner.hardware import find_interconnect, gpu_presets, interconnect_presets
from cluster.planner.plan import Plan, PlanRequest, make_plan
from cluster.planner.precision import QUANTIZATIONS, SCHEMES
from experts.errors import ConfigError

# Every count that people book; beyond them no suggestion is smaller than asking for another model.
_NODE_COUNTS = (*range(1, 17), 24, 32, 48, 64)
# A change that gives less than this is not worth a line.
_WORTHWHILE = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change to a request, and the plan that it leads to. `flag` is what to type."""

    flag: str
    meaning: str
    plan: Plan

    def __str__(self) -> str:
        plan = self.plan
        return f"{self.meaning} ({self.flag}): {plan.tokens_per_second:,.0f} tokens/s on {plan.gpus} GPUs"


def smallest_that_fits(plan: Plan) -> tuple[Change, ...]:
    """For a plan that does not fit: changes that make it fit, fewest GPUs first, the same card before others.

    One entry a card (the fewest of its nodes), and one a quantisation on the very hardware that was asked
    for; where no single change is enough, a narrower quantisation and other hardware together.
    """
    request = plan.request
    found = [change for change in _quantizations(request) if change.plan.fits]
    found += _other_hardware(request)
    if not found:
        for change in _quantizations(request):
            found += (
                replace(both, flag=f"{change.flag} {both.flag}", meaning=f"{both.meaning}, {change.meaning}")
                for both in _other_hardware(change.plan.request)
            )
    return tuple(sorted(found, key=lambda c: (c.plan.gpus, c.plan.request.gpu.name != request.gpu.name)))


def _other_hardware(request: PlanRequest) -> Iterator[Change]:
    """For each card the fewest nodes of it that fit."""
    for gpu in gpu_presets().values():
        same = gpu.name == request.gpu.name
        joined = request.interconnect if same else find_interconnect(gpu.interconnect)
        for nodes in _NODE_COUNTS:
            candidate = _planned(replace(request, gpu=gpu, interconnect=joined, nodes=nodes))
            if candidate is not None and candidate.fits:
                size = f"--nodes {nodes} --gpus-per-node {request.gpus_per_node}"
                flag = size if same else f"--gpu {gpu.name} {size}"
                yield Change(flag=flag, meaning=f"{nodes} x {request.gpus_per_node} {gpu.name}", plan=candidate)
                break


def cheapest_lift(plan: Plan) -> Change | None:
    """For a plan that fits: the change that lifts its binding constraint at the least cost.

    Lifted means that something else binds, or that tokens/s rise by a fifth. Least cost is no GPU more, then
    the fewest more; among equals the one that gives most tokens/s. None where no change gives 5 % more.
    """
    request = replace(plan.request, load=None)
    before = _planned(request)
    if before is None:
        return None
    changes = [
        change
        for change in (*_software(request), *_hardware(request))
        if change.plan.fits
        and change.plan.tokens_per_second > _WORTHWHILE * before.tokens_per_second
        and (
            change.plan.binding_constraint != before.binding_constraint
            or change.plan.tokens_per_second > 1.2 * before.tokens_per_second
        )
    ]
    return min(changes, key=lambda c: (c.plan.gpus, _effort(c, request), -c.plan.tokens_per_second), default=None)


def _effort(change: Change, request: PlanRequest) -> int:
    """Among changes with equally many GPUs: a flag before other wires, other wires before other cards."""
    if change.plan.request.gpu.name != request.gpu.name:
        return 2
    return 1 if change.plan.request.interconnect != request.interconnect else 0


def _software(request: PlanRequest) -> Iterator[Change]:
    if request.wire_dtype != "fp8":
        yield from _change(replace(request, wire_dtype="fp8"), "--wire-dtype fp8", "dispatch in fp8, with its error")
    yield from _quantizations(request)
    more = 2 * request.max_num_seqs
    yield from _change(
        replace(request, max_num_seqs=more), f"--max-num-seqs {more}", "decode twice the sequences at once"
    )


def _hardware(request: PlanRequest) -> Iterator[Change]:
    faster = [i for i in interconnect_presets().values() if i.bytes_per_s > request.interconnect.bytes_per_s]
    for interconnect in faster:
        changed = replace(request, interconnect=interconnect)
        yield from _change(changed, f"--interconnect {interconnect.name}", f"join the nodes by {interconnect.name}")
    nodes = request.nodes + 1
    yield from _change(replace(request, nodes=nodes), f"--nodes {nodes}", "one more node")
    for gpu in gpu_presets().values():
        if gpu.memory_bytes_per_s > request.gpu.memory_bytes_per_s:
            yield from _change(replace(request, gpu=gpu), f"--gpu {gpu.name}", f"{gpu.name} instead")


def _quantizations(request: PlanRequest) -> Iterator[Change]:
    """Narrower experts than now; each costs some quality, which experts/README.md measures."""
    now = _planned(request)
    bits = now.scheme.weight_bits if now is not None else 32
    for name in QUANTIZATIONS[1:]:
        if SCHEMES[name].weight_bits < bits:
            yield from _change(
                replace(request, quantization=name),
                f"--quantization {name}",
                f"hold experts in {name}, with its error",
            )


def _change(request: PlanRequest, flag: str, meaning: str) -> Iterator[Change]:
    plan = _planned(request)
    if plan is not None:
        yield Change(flag=flag, meaning=meaning, plan=plan)


def _planned(request: PlanRequest) -> Plan | None:
    """The plan, or None where the request is one that no card of its kind could meet."""
    try:
        return make_plan(request)
    except ConfigError:
        return None
