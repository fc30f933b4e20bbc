#!/usr/bin/env bash
# llmtrain train on the processes of this host, or as one host of several.
#
#   launch/torchrun.sh model=gpt2_124m data.path=DIR run.dir=DIR …          one process a GPU, or one
#   NPROC_PER_NODE=8 launch/torchrun.sh …                                   as many as you say
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh …             on host 0 of two
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 launch/torchrun.sh …             on host 1
#   NNODES=2 RDZV_ENDPOINT=host0:29500 launch/torchrun.sh …                 on each; they number themselves
#
# MASTER_PORT is 29500 unless set. Rank 0 speaks on the console; every rank R writes rankR.log in LOG_DIR,
# or in logs/ of the run folder. The exit code is that of the rank that failed, or 75
# where SIGTERM, SIGUSR1 or Ctrl-C asked it to stop and it saved: the same command goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

find_python
exec "$python" -m llmtrain.distributed.torchrun "$@"
