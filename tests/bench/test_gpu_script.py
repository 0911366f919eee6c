"""gpu.sh where there is no card: every path of it but the card's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("gpu.sh")
BENCH = Path(__file__).with_name("gpu_bench.py")


def run(out, *command, **variables):
    environment = os.environ | {
        "OUT": str(out),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "OMP_NUM_THREADS": "1",
        "EXPERTMESH_CACHE_DIR": str(out / "cache"),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=280)


def test_dry_run_fills_the_table_and_survives_a_failure(tmp_path):
    done = run(tmp_path, SCRIPT, "--dry-run", "--schemes", "none,no_such_scheme,fp8_block,int4")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    timed = [row for row in report["rows"] if "ms" in row]
    # 3 schemes that exist, 2 shapes, 2 numbers of rows, up + down + all
    assert len(timed) == 3 * 2 * 2 * 3
    assert {row["scheme"] for row in report["rows"] if "error" in row} == {"no_such_scheme"}
    for row in timed:
        assert row["ms"] > 0
        assert row["tflops"] > 0
        if row["projection"] != "all":
            assert row["dense_ms"] > 0
    exact = [row for row in timed if row["projection"] == "all" and row["scheme"] in ("none", "int4")]
    assert exact
    assert all(row["relative_error"] < 0.01 for row in exact)
    assert report["summary"]["failed"] == ["tiny no_such_scheme", "tiny odd no_such_scheme"]
    assert "2 passed" in (tmp_path / "correctness.log").read_text()
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("| tiny odd | 7 | int4 |") == 3
    assert "no_such_scheme: ConfigError" in table


def test_no_time_left_is_said(tmp_path):
    done = run(tmp_path, sys.executable, BENCH, "--out", tmp_path, "--dry-run", "--seconds", "-1", "--schemes", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["summary"]["skipped"] == 2
    assert report["summary"]["none_tflops"] is None


def test_without_a_card_it_says_so(tmp_path):
    done = run(tmp_path, SCRIPT, ONLY="times")
    assert done.returncode == 2
    assert "no CUDA card" in done.stderr
