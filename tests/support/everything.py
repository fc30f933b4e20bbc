"""Imports all that llmtrain may import and composes configurations; other processes are forked from it then.

Hydra's first composition takes twice as long as those after it: it looks for plugins, and its parser learns.
"""

import gc
import importlib
import pkgutil

import antlr4.LL1Analyzer  # noqa: F401
import deepspeed  # noqa: F401
import hydra._internal.core_plugins
import hydra.utils  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import sentencepiece.sentencepiece_model_pb2  # noqa: F401  # when a tokenizer is opened
import torch._dynamo  # noqa: F401  # an optimizer's first step would

import llmtrain
import tests.support.peak  # noqa: F401
from llmtrain.cli import hydra_app

for module in pkgutil.walk_packages(llmtrain.__path__, "llmtrain."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

for verb in ("train", "finetune", "prepare", "plan"):
    hydra_app._compose(verb, ["++a.b=1.0", "++c='d'", "++e=[f,null]"])

gc.freeze()  # collections would touch, and so copy, every page
