"""Imports all that llmtrain may import: for processes that others are forked from."""

import importlib
import pkgutil

import deepspeed  # noqa: F401
import hydra.utils  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401  # an optimizer's first step would

import llmtrain

for module in pkgutil.walk_packages(llmtrain.__path__, "llmtrain."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
