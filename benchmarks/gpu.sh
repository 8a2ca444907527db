#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the kernels' tests at full size, the benchmark, the kernels' other tests.
#
#     benchmarks/gpu.sh OUT [tests] [suite] [kernels]
#
# OUT gets a log of each part and the benchmark's results. A part that fails does not keep the next from running; the
# exit status is then 1. Nothing has to be installed but what the benchmark and the tests import. COMMIT says which
# commit this is where there is no git to ask.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=$(command -v python3 || command -v python)

run() { # name, command...
    local name=$1 began=$SECONDS status
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: exit status $status after $((SECONDS - began)) s" | tee -a "$out/summary.log"
    [ "$status" = 0 ] || failed=1
}

failed=0
for part in ${*:-tests suite kernels}; do
    case $part in
        tests) run tests "$python" -m pytest tests/backends/test_gpu.py -v --durations=0 ;;
        suite) run suite "$python" benchmarks/run.py --device cuda --suite all --out "$out" ${COMMIT:+--commit "$COMMIT"} ;;
        kernels) run kernels "$python" -m pytest tests/backends --ignore=tests/backends/test_gpu.py --durations=20 ;;
        *) echo "no part is called $part: tests, suite, kernels" >&2 && exit 2 ;;
    esac
done
exit $failed
