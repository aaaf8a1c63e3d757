#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command, on a machine without a network:
#   [OUT=folder] bash benchmarks/gpu_pass.sh
# Needs Python 3.10+, torch with CUDA, Triton, nvcc, cmake, ninja, pybind11 and pytest. Builds in place for this GPU's
# architecture alone, runs the GPU-marked tests, and leaves at most 8 files in $OUT (default gpu_out):
#   environment.txt  build.txt  tests.txt  tests.xml  timing.txt  nf4.txt  status.txt
# A step that fails does not stop the next one; status.txt has each one's exit code, and the script ends with the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-gpu_out}" && cd "${OUT:-gpu_out}" && pwd)
PYTHON=${PYTHON:-python3}
TEST_SECONDS=${TEST_SECONDS:-420}
export PYTHONUNBUFFERED=1
worst=0

step() { # step NAME FILE COMMAND...
  local name=$1 file=$2 code
  shift 2
  echo "== $name"
  "$@" >"$OUT/$file" 2>&1
  code=$?
  tail -n 15 "$OUT/$file"
  echo "$name: $code" >>"$OUT/status.txt"
  [ "$code" -gt "$worst" ] && worst=$code
  return 0
}

: >"$OUT/status.txt"
step build build.txt env LORAKERNELS_BUILD=cuda "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e .
step environment environment.txt bash -c "nvidia-smi; '$PYTHON' -m lorakernels; git rev-parse HEAD"
step tests tests.txt timeout "$TEST_SECONDS" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$OUT/tests.xml"
step timing timing.txt timeout 180 "$PYTHON" benchmarks/lora_layer.py --base bfloat16 --seconds 2
step nf4 nf4.txt timeout 120 "$PYTHON" benchmarks/nf4_linear.py --seconds 0.1
cat "$OUT/status.txt"
exit "$worst"
