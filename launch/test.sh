#!/usr/bin/env bash
# All set-up, then the tests: ./launch/test.sh [PYTEST ARGUMENTS…]; the exit code is pytest's.
#
#   ./launch/test.sh                      everything, on up to four cores
#   ./launch/test.sh -m 'not slow'        the fast ones only
#   ./launch/test.sh tests/unit/data -x   some of them
#
# Tests over two hosts and over Slurm need root, `ip netns` (iproute2), slurm-wlm and munge; where these
# cannot be had they are skipped, and say so. With CI=1 they fail instead.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up test
cd "$repository"
say "running the tests"
# Files of tests run side by side, those with slow tests first; a file's own tests share what they start.
# One thread each: more than there are cores would wait for one another.
if (($# == 0)); then
    export OMP_NUM_THREADS=1
    # DeepSpeed's CPU optimizer takes minutes to compile, once: beside the tests that do without.
    "$python" -m tests.support.kernel >/dev/null 2>&1 &
    set -- --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
