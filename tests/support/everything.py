"""Imports all that llmtrain may import: for processes that others are forked from."""

import gc
import importlib
import pkgutil

import antlr4.LL1Analyzer  # noqa: F401
import deepspeed  # noqa: F401
import hydra._internal.core_plugins
import hydra.utils  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401  # an optimizer's first step would

import llmtrain

for module in pkgutil.walk_packages(llmtrain.__path__, "llmtrain."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

gc.freeze()  # collections would touch, and so copy, every page
