"""The benchmark's rows as a table for people and as the goals that they meet or miss."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

# H100: bf16 at 256 rows an expert and more, fp8 by row, fp8 by block in TFLOP/s; decode as a share of copy bandwidth.
GOALS = {"none_tflops": 650, "fp8_tflops": 780, "fp8_block_tflops": 400, "decode_share_of_copy": 0.87}
ERROR_LIMITS = {"none": 0.01, "fp8": 0.02, "fp8_block": 0.02, "int8": 0.01, "int4": 0.01}


def summarise(rows: list[Row], copy_gb_s: float | None) -> dict[str, Any]:
    """Best rates by scheme where each goal applies, and every row that failed, is wrong or loses to grouped_mm."""
    timed = [row for row in rows if "error" not in row and "ms" in row]

    def best(scheme: str) -> float | None:
        rates = [row["tflops"] for row in timed if row["scheme"] == scheme and row["rows_per_expert"] >= 256]
        return max(rates, default=None)

    reads = [
        row["gb_s"]
        for row in timed
        if row["scheme"] == "none" and row["rows"] >= row["experts"] and row["rows_per_expert"] <= 16
    ]
    return {
        "none_tflops": best("none"),
        "fp8_tflops": best("fp8"),
        "fp8_block_tflops": best("fp8_block"),
        "decode_share_of_copy": max(reads) / copy_gb_s if reads and copy_gb_s else None,
        "goals": GOALS,
        "slower_than_grouped_mm": [name_of(row) for row in timed if row.get("vs_grouped_mm", 9.0) < 1.0],
        "wrong": [name_of(row) for row in rows if row.get("wrong")],
        "failed": [name_of(row) for row in rows if "error" in row],
        "skipped": sum("skipped" in row for row in rows),
    }


def name_of(row: Row) -> str:
    """Shape, rows, scheme and projection of a row."""
    return " ".join(str(row[key]) for key in ("shape", "rows", "scheme", "projection") if key in row)


def markdown(report: dict[str, Any]) -> str:
    """A table of the timed rows, what failed under it."""
    machine = report["machine"]
    lines = [
        f"{machine['card']}, torch {machine['torch']}, triton {machine['triton']}; "
        f"copy {_number(machine['copy_gb_s'])} GB/s, dense 8192^3 {_number(machine['dense_tflops'])} TFLOP/s",
        "",
        "| shape | rows | scheme | projection | ms | TFLOP/s | GB/s | vs grouped_mm | vs dense |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        if "ms" not in row:
            continue
        cells = [row["shape"], row["rows"], row["scheme"], row["projection"], f"{row['ms']:.4f}"]
        cells += [_number(row.get(key)) for key in ("tflops", "gb_s", "vs_grouped_mm", "vs_dense")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"- {name_of(row)}: {row['error']}" for row in report["rows"] if "error" in row)]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
