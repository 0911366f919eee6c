"""The kernels as Hopper will run them, compiled on this machine: the interpreter takes tiles that no card does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 227 * 1024
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compile_all(which, capability=90):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, SCRIPT, which, str(capability)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernel):
    tiles = kernel["config"]
    assert "error" not in kernel, kernel
    assert kernel["stack"] == 0, f"registers spill: {kernel}"
    assert kernel["shared"] <= HOPPER_SHARED_BYTES, kernel
    assert kernel["wgmma"], kernel
    assert not kernel["mma_sync"], kernel
    operands = "e4m3.e4m3" if kernel["scheme"] in ("fp8", "fp8_block") else "bf16.bf16"
    assert all(operands in instruction for instruction in kernel["wgmma"]), kernel
    if tiles["kernel"] == "prefill":
        assert kernel["tma_loads"], kernel
    else:
        # 16 bytes a copy, but for the narrow codes: 64 or 128 bytes a row
        assert 16 in kernel["async_copy_bytes"], kernel
        assert min(kernel["async_copy_bytes"]) >= (8 if kernel["scheme"] in ("int8", "int4") else 16), kernel


@pytest.fixture(scope="module")
def defaults():
    return compile_all("defaults")


@pytest.mark.parametrize("scheme", ["none", "fp8", "fp8_block", "int8", "int4"])
def test_defaults_use_tensor_cores_and_do_not_spill(defaults, scheme):
    kernels = [kernel for kernel in defaults if kernel.get("scheme") == scheme]
    assert {kernel["projection"] for kernel in kernels} == {"up", "down"}
    for kernel in kernels:
        check(kernel)


def test_kernels_around_the_matmuls_compile_and_do_not_spill(defaults):
    others = [kernel for kernel in defaults if "kernel" in kernel]
    assert len(others) == 7
    for kernel in others:
        assert kernel["stack"] == 0, kernel


@pytest.mark.slow
def test_every_candidate_uses_tensor_cores_and_does_not_spill():
    for kernel in compile_all("candidates"):
        check(kernel)


@pytest.mark.slow
def test_blackwell_uses_its_tensor_cores_and_does_not_spill():
    kernels = [kernel for kernel in compile_all("defaults", 100) if "scheme" in kernel]
    assert len({kernel["scheme"] for kernel in kernels}) == 5
    for kernel in kernels:
        assert "error" not in kernel, kernel
        assert kernel["tcgen05"], kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= HOPPER_SHARED_BYTES, kernel
