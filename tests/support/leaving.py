"""Ranks that meet over gloo and leave, four for each port that is given; prints their exit codes.

All are forked from this process, which has imported torch.
"""

import os
import sys

import torch

from llmtrain.cli import main as cli
from llmtrain.distributed import processes

sys.stdout.flush()
for turn, port in enumerate(map(int, sys.argv[1:])):
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            processes.start(torch.device("cpu"))
            for _ in range(5):
                processes.all_sum(torch.ones(1000))
            processes.gather({"rank": rank})
            cli.finish(0 if turn % 2 else 2)
        children.append(child)
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
