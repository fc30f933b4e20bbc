#!/usr/bin/env bash
# Run `llmtrain train` on several processes of this host, or on this host as one of several.
#
#   launch/torchrun.sh model=gpt2_124m data.path=DIR run.dir=DIR …          one process per GPU, or one
#   NPROC_PER_NODE=8 launch/torchrun.sh …                                   eight processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh …             on host 0 of two
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 launch/torchrun.sh …             on host 1 of two
#   NNODES=2 RDZV_ENDPOINT=host0:29500 launch/torchrun.sh …                 on both; ranks in order of arrival
#   MAX_RESTARTS=3 launch/torchrun.sh …                                     ranks that fail are started anew
#   NNODES=2:3 RDZV_ENDPOINT=host0:29500 launch/torchrun.sh …               goes on if one of three hosts is lost
#
# MASTER_PORT defaults to 29500. Rank 0 prints to the console; every rank R writes rankR.log to LOG_DIR, by default
# logs/ in the run folder. The exit code is that of the rank that failed, or 75 if SIGTERM, SIGUSR1 or Ctrl-C asked
# the run to stop and it saved; the same command then resumes it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

find_python
exec "$python" -m llmtrain.distributed.torchrun "$@"
