#!/usr/bin/env bash
# All that needs a GPU, in one go: build, tests, sanitizers, benchmarks.
#
#   benchmarks/gpu.sh [folder for the results; gpu-results by default]
#
# Needs nvcc, a CUDA build of torch, NumPy, pytest, pybind11, scikit-build-core, CMake and ninja,
# and no network.  PYTHON names the interpreter.  Nothing is written but the results and a temporary
# folder.  What fails after the build does not stop the rest; the exit code is 1 if anything failed.
# Without a GPU it builds, and says so.
set -u

python=$(command -v "${PYTHON:-python3}") && python=$(realpath -s "$python") || exit 1
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
mkdir -p "${1:-gpu-results}" && results=$(cd "${1:-gpu-results}" && pwd) || exit 1
temporary=$(mktemp -d) || exit 1
trap 'rm -rf "$temporary"' EXIT
cd "$repository" || exit 1

export PYTHONPATH=$temporary/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export TMPDIR=$temporary XDG_CACHE_HOME=$temporary CUDA_CACHE_PATH=$temporary TRITON_HOME=$temporary
failed=0
: > "$results/summary.txt"

# say <words>: a line of the summary, also shown.
say() { echo "$*" | tee -a "$results/summary.txt"; }

# step <name> <command...>: output to <name>.txt; how it went, and the last line, to the summary.
step() {
  local name=$1 begin=$SECONDS outcome=pass
  shift
  "$@" > "$results/$name.txt" 2>&1 || { outcome=FAIL; failed=1; }
  say "$outcome  $name  $((SECONDS - begin)) s  $(tail -n 1 "$results/$name.txt")"
  [ "$outcome" = pass ]
}

step build "$python" -m pip install . --target "$temporary/site" --verbose \
  --no-build-isolation --no-deps --no-index --no-cache-dir --disable-pip-version-check \
  -Cbuild-dir="$temporary/objects" \
  -Ccmake.define.SEGFUSE_CUDA=ON -Ccmake.define.SEGFUSE_EMULATED=ON || exit 1

# An editable install in the same environment would come before what was just built.
step info "$python" -c '
import sys, segfuse
from segfuse import info
if not segfuse.__file__.startswith(sys.argv[1]):
    sys.exit("another segfuse is imported than was built: pip uninstall segfuse")
print(*map(": ".join, info.describe()), sep="\n")' "$temporary" || exit 1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "There is no GPU that torch can use: built, and nothing else was done."
  exit 0
fi

pytest=("$python" -m pytest -p no:cacheprovider)
step tests "${pytest[@]}" tests/test_ops.py tests/test_unet.py --junitxml "$results/tests.xml"

# Each tensor in an allocation of its own, since overruns within torch's pool are not seen.
# Errors of CUDA's own functions are not counted: torch asks what may be answered with one.
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
for tool in memcheck racecheck synccheck; do
  options=(--tool "$tool" --error-exitcode 1)
  [ "$tool" = memcheck ] && options+=(--report-api-errors no)
  if [ -n "$sanitizer" ]; then
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" "${options[@]}" \
      "${pytest[@]}" tests/test_ops.py -k "cuda and float32 and reference"
  else
    say "none  $tool  compute-sanitizer was not found"
  fi
done

step cuda "$python" benchmarks/run.py --json "$results/cuda.json" \
  --device cuda --dtype float32 bfloat16 float16
step cpu "$python" benchmarks/run.py --json "$results/cpu.json" --dtype float32 bfloat16
exit "$failed"
