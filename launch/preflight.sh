#!/usr/bin/env bash
# Run `llmtrain preflight` on several processes of this host, or on this host as one of several: names the host, rank,
# GPU or link that is broken or slow, in under two minutes.
#
#   launch/preflight.sh run.dir=DIR                                         one process per GPU, or one
#   NPROC_PER_NODE=8 launch/preflight.sh …                                  eight processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/preflight.sh …            on host 0 of two, and so on
#
# The environment is that of launch/torchrun.sh. The exit code is 0 if nothing is off, 2 if something is, 1 if hosts do
# not come. Each rank R writes rankR.log to LOG_DIR, by default a new folder for temporary files.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

find_python
export LOG_DIR=${LOG_DIR:-$(mktemp -d -t llmtrain-preflight.XXXXXX)}
export START_TIMEOUT=${START_TIMEOUT:-120}
exec "$python" -m llmtrain.distributed.torchrun --verb preflight "$@"
