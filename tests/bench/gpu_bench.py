"""Times the experts' kernels on this machine's GPU beside torch's; see gpu.sh, which checks their results first.

A failure becomes a row with its error and the rest goes on; rows that the time does not allow say so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_rivals
import torch
from gpu_cases import Case, Clock
from gpu_report import ERROR_LIMITS, Row, markdown, summarise

from experts.ops._triton.timing import milliseconds
from experts.ops.tune_backend import tune_backend
from experts.ops.tuning import triton_version


def wall_clock(run: Callable[[], object]) -> float:
    """ms on the wall, for a dry run in the interpreter."""
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def guarded(measure: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what `measure` returns, None) or (None, what it raised)."""
    try:
        return measure(), None
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"[:300]


def rows_of(case: Case, rows: int, clock: Clock) -> Iterator[Row]:
    """Up, down and everything for one number of rows, each with its rivals' times."""
    call = case.call(rows)
    hit = call.slots_S.numel()
    head = {
        "shape": case.shape.name,
        "experts": case.shape.experts,
        "rows": rows,
        "rows_per_expert": rows / hit,
        "scheme": case.scheme.name,
    }
    relative_error, wrong = guarded(lambda: case.relative_error(call))
    times, failed = guarded(lambda: case.time_projections(call, clock))
    grouped, grouped_failed = guarded(lambda: gpu_rivals.time_grouped_mm(case, call, clock))
    dense, _ = guarded(lambda: gpu_rivals.time_dense(case, call, clock))
    for projection in ("up", "down"):
        row: Row = head | {"projection": projection}
        if failed is not None:
            yield row | {"error": failed}
            continue
        ms = times[projection]
        n, k = case.sizes(projection)
        activations = rows * (k + (n // 2 if projection == "up" else n)) * case.dtype.itemsize
        row |= {
            "ms": ms,
            "tflops": case.flops(projection, rows) / ms / 1e9,
            "gb_s": (hit * case.weight_bytes(projection) + activations) / ms / 1e6,
        }
        if grouped is not None:
            row |= {"grouped_mm_ms": grouped[projection], "vs_grouped_mm": grouped[projection] / ms}
        else:
            row |= {"grouped_mm_error": grouped_failed}
        if dense is not None:
            row |= {"dense_ms": dense[projection], "vs_dense": dense[projection] / ms}
        yield row
    ms, failed = guarded(lambda: case.time_all(call, clock))
    whole: Row = head | {"projection": "all"}
    if failed is not None or wrong is not None:
        yield whole | {"error": failed or wrong}
        return
    yield whole | {
        "ms": ms,
        "tflops": sum(case.flops(p, rows) for p in ("up", "down")) / ms / 1e9,
        "gb_s": hit * sum(case.weight_bytes(p) for p in ("up", "down")) / ms / 1e6,
        "combine_ms": guarded(lambda: gpu_cases.time_combine(case, call, clock))[0],
        "relative_error": relative_error,
        "wrong": not relative_error < ERROR_LIMITS[case.scheme.name],
    }


def measure_all(options: argparse.Namespace, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Every shape, scheme and number of rows, as far as the time reaches."""
    shapes, row_counts = (
        (gpu_cases.TINY_SHAPES, gpu_cases.TINY_ROWS) if options.dry_run else (gpu_cases.SHAPES, gpu_cases.ROWS)
    )
    dtype = torch.float16 if options.dry_run else torch.bfloat16
    deadline = time.monotonic() + options.seconds
    for scheme in options.schemes.split(","):
        for shape in shapes:
            head = {"shape": shape.name, "scheme": scheme}
            if time.monotonic() > deadline:
                yield head | {"skipped": f"over {options.seconds} s"}
                continue
            case, failed = guarded(lambda shape=shape, scheme=scheme: Case(shape, scheme, device, dtype))
            if failed is not None:
                yield head | {"error": failed}
                continue
            yield head | {"load_and_warm_s": case.load_and_warm_s}
            if options.tune:
                steps, failed = guarded(
                    lambda case=case: list(tune_backend(case.backend, range(case.shape.experts), dtype=case.dtype))
                )
                yield head | ({"error": failed} if failed else {"tuned": [step._asdict() for step in steps]})
            for rows in row_counts:
                if time.monotonic() > deadline:
                    yield head | {"rows": rows, "skipped": f"over {options.seconds} s"}
                    continue
                found, failed = guarded(lambda case=case, rows=rows: list(rows_of(case, rows, clock)))
                yield from found if failed is None else [head | {"rows": rows, "error": failed}]
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--schemes", default="none,fp8_block,fp8,int8,int4")
    parser.add_argument("--seconds", type=float, default=420.0, help="start nothing new after so long")
    parser.add_argument("--tune", action="store_true", help="time the tile candidates first, and use the fastest")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, no card")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_bench: this machine has no CUDA card; --dry-run tries the script without one", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    clock = wall_clock if options.dry_run else milliseconds
    small = options.dry_run
    machine = {
        "card": "interpreter" if small else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "copy_gb_s": guarded(lambda: gpu_rivals.copy_gb_s(device, clock, nbytes=1 << (16 if small else 31)))[0],
        "dense_tflops": guarded(
            lambda: gpu_rivals.square_tflops(
                device, clock, size=64 if small else 8192, dtype=torch.float16 if small else torch.bfloat16
            )
        )[0],
    }
    report: dict[str, Any] = {"machine": machine, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for row in measure_all(options, device, clock):
        print(json.dumps(row, default=vars), flush=True)
        report["rows"].append(row)
        # Written after every row: a run that is cut off leaves what it has.
        report["summary"] = summarise(report["rows"], machine["copy_gb_s"])
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
        (options.out / "gpu.md").write_text(markdown(report))
    print(json.dumps(report["summary"]), flush=True)
    return 1 if report["summary"]["wrong"] or report["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
