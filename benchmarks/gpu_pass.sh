#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command, on a machine without a network:
#   [OUT=folder] [PEERS=folder] bash benchmarks/gpu_pass.sh [BUDGET_SECONDS]
# Needs Python 3.10+, torch with CUDA, Triton, nvcc, cmake, ninja, pybind11 and pytest. Builds in place for this GPU's
# architecture alone; runs the GPU-marked tests, then a small set of kernels under compute-sanitizer; tunes the tables' most
# valuable rows; and runs the suite with those, the most telling rows first, eager and in CUDA graphs. Leaves 8 files in $OUT (default
# gpu_out): build.txt tests.txt tests.xml sanitizer.txt tune.txt tiles.json results.json status.txt
# (the suite's table is the end of status.txt). A step that fails does not stop the next one; the script ends with the worst exit
# code. A second call skips the steps that ended well, and the suite goes on with the rows that are missing. DRY_RUN=1: the same steps
# on a CPU, small, and nothing is built.
set -uo pipefail
cd "$(dirname "$0")/.."
BUDGET=${1:-600}
OUT=$(mkdir -p "${OUT:-gpu_out}" && cd "${OUT:-gpu_out}" && pwd)
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
export PYTHONUNBUFFERED=1
START=$SECONDS
worst=0
touch "$OUT/status.txt"
sed -i '/^suite:/,$d' "$OUT/status.txt" # it goes on with the rows that it lacks, if any; its table stands below it

left() { echo $((BUDGET - (SECONDS - START) > 5 ? BUDGET - (SECONDS - START) : 5)); }

step() { # step NAME SHARE_OF_BUDGET_IN_PERCENT FILE COMMAND...
  local name=$1 share=$2 file=$3 code begun=$SECONDS limit=$((BUDGET * $2 / 100))
  shift 3
  if grep -q "^$name: 0 " "$OUT/status.txt"; then
    echo "== $name: done before"
    return 0
  fi
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  echo "== $name (at most $limit s)"
  LIMIT=$limit timeout "$limit" "$@" >"$OUT/$file" 2>&1
  code=$?
  tail -n 8 "$OUT/$file"
  echo "$name: $code in $((SECONDS - begun)) s of $limit" >>"$OUT/status.txt"
  [ "$code" -gt "$worst" ] && worst=$code
  return 0
}

environment() { nvidia-smi 2>&1; "$PYTHON" -m lorakernels; "$PYTHON" -m benchmarks env; }
build() { LORAKERNELS_BUILD=cuda "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e . && environment; }
tests() { "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$OUT/tests.xml"; }
sanitizer() { # the caching allocator hides what is out of bounds, so it is off
  if ! command -v compute-sanitizer; then
    echo "not run: compute-sanitizer is not installed"
    return 0
  fi
  local tool code=0
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((LIMIT / 2)) compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/sanitized.py 2>&1 | tee "$OUT/.tool"
    [ "${PIPESTATUS[0]}" = 0 ] || code=9
    if grep -qi "not supported\|not permitted\|insufficient permission\|unable to" "$OUT/.tool"; then
      echo "$tool: this machine does not allow it (see above)"
      code=0
    fi
  done
  rm -f "$OUT/.tool"
  return $code
}
tuned() { "$PYTHON" -m benchmarks tune --budget $((LIMIT - 10 > 5 ? LIMIT - 10 : 5)) --out "$OUT/tiles.json" $1; }
suite() { # the table goes where the step's own file is; results.json is the result
  [ -s "$OUT/tiles.json" ] && export LORAKERNELS_TUNED="$OUT/tiles.json"
  "$PYTHON" -m benchmarks run --resume --json "$OUT/results.json" --budget $((LIMIT - 15 > 5 ? LIMIT - 15 : 5)) ${PEERS:+--peers "$PEERS"} "$@"
}
export -f environment build tests sanitizer tuned suite
export OUT PYTHON PEERS="${PEERS:-}"

if [ -n "$DRY_RUN" ]; then
  export LORAKERNELS_TUNED=off # rows of the interpreter mean nothing
  step build 20 build.txt bash -c environment
  step tests 30 tests.txt "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --collect-only --junitxml="$OUT/tests.xml" tests/test_gpu.py
  step sanitizer 10 sanitizer.txt bash -c sanitizer
  step tune 30 tune.txt bash -c "tuned --dry-run"
  step suite 60 suite.txt bash -c "suite --shapes calls --op lora,multi --mode fwd+bwd --seconds 0.05 --passes 1 --no-compile"
else
  step build 35 build.txt bash -c build
  step tests 45 tests.txt bash -c tests
  step sanitizer 12 sanitizer.txt bash -c sanitizer
  step tune 20 tune.txt bash -c tuned
  step suite 100 suite.txt bash -c suite
fi
cat "$OUT/status.txt"
cat "$OUT/suite.txt" >>"$OUT/status.txt"
rm -f "$OUT/suite.txt"
exit "$worst"
