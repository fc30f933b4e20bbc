"""Compiles DeepSpeed's CPU Adam, a minute or two, into a folder of this environment of Python, once for all
runs of the suite: python -m tests.support.kernel

Where several processes ask, one compiles and the others wait for it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from llmtrain.distributed import toolchain
from tests.support import ranks

FOLDER = os.path.join(sys.prefix, "torch_extensions")
VARIABLE = "TORCH_EXTENSIONS_DIR"
"""torch's own; its usual folder is the user's, where each environment of Python compiles all again."""


def build() -> None:
    """Compile it, unless that is done, in a process of its own: no rank's answer may take so long."""
    folder = toolchain.build_folder("cpu_adam")
    toolchain.drop_stale_locks(folder.parent)
    if (folder / "cpu_adam.so").exists():  # a rank that loads it compiles again what is out of date
        return
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=ranks.TIMEOUT_SECONDS)


if __name__ == "__main__":
    os.environ.setdefault(VARIABLE, FOLDER)
    build()
