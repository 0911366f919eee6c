#!/usr/bin/env bash
# Checks and times the GPU kernels on this machine's card. Needs torch, triton, pytest and hypothesis; no Ray, no network.
#
#   tests/bench/gpu.sh [--tune] [--schemes none,fp8,...] [--seconds 420]     results in $OUT (default build/gpu)
#   ONLY=correctness tests/bench/gpu.sh, ONLY=times tests/bench/gpu.sh       one half
#   tests/bench/gpu.sh --dry-run       tiny shapes in Triton's interpreter, to try this script where there is no card
#
# Writes correctness.log, gpu.json and gpu.md. Exit status: 0 all well, 1 something is wrong or failed, 2 no card.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT"

tests=(tests/experts/ops/triton tests/experts/quant)
if [[ " $* " == *" --dry-run "* ]]; then
  export TRITON_INTERPRET=1
  tests=(tests/experts/ops/triton/test_tiles.py)
else
  unset TRITON_INTERPRET
fi

correct=0 timed=0
if [[ ${ONLY:-correctness} == correctness ]]; then
  # --confcutdir: the conftest.py files above these tests want Ray and transformers.
  echo "== correctness"
  "$PYTHON" -m pytest "${tests[@]}" --confcutdir=tests/experts/ops/triton -o filterwarnings= -o timeout=0 \
    -p no:cacheprovider -m "not slow" --maxfail=20 2>&1 | tee "$OUT/correctness.log"
  correct=$?
fi
if [[ ${ONLY:-times} == times ]]; then
  echo "== times"
  "$PYTHON" tests/bench/gpu_bench.py --out "$OUT" "$@"
  timed=$?
  cat "$OUT/gpu.md" 2>/dev/null
fi
((timed == 2)) && exit 2
((correct == 0 && timed == 0))
