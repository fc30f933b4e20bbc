#!/usr/bin/env bash
# Set up an environment and run the tests: ./launch/test.sh [PYTEST ARGUMENTS…]; the exit code is that of pytest.
#
#   ./launch/test.sh                      all tests, in up to four processes
#   ./launch/test.sh -m 'not slow'        fast tests only
#   ./launch/test.sh tests/unit/data -x   some of the tests
#
# Tests with two hosts and with Slurm need root, `ip netns` (iproute2), slurm-wlm and munge. Without these they are
# skipped with a message, or fail if CI=1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up test
cd "$repository"
say "running the tests"
# Run test files in parallel, those with slow tests first; the tests of a file share fixtures. Use two processes
# more than cores, since a third of the time tests wait for ranks, servers and time limits, and one thread per process:
# more threads than cores would slow each other down.
if (($# == 0)); then
    export OMP_NUM_THREADS=1
    # Compile sources once, not in each of a hundred processes.
    unset PYTHONDONTWRITEBYTECODE
    # DeepSpeed's CPU optimizer takes minutes to compile, once: beside the tests that do without.
    "$python" -m tests.support.kernel >/dev/null 2>&1 &
    processes=$("$python" -c "import os; print(min(4, (os.cpu_count() or 1) + 2))")
    set -- --numprocesses "$processes" --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
