"""Greedy texts and beams in fp32: token for token those of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llmtrain.commands.loading import build_module
from llmtrain.commands.resolve import resolve
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from llmtrain.nn.initialize import initialize
from tests.gpu.runs import family_overrides, no_tf32
from tests.gpu.table import Row, judged
from tests.support.training import compose

FAMILIES = ("GPT-2 form", "Llama form", "Qwen 3 form", "LSTM", "T5", "BART", "Transformer")
GREEDY = GenerateConfig(max_new_tokens=16, temperature=0.0)
WAYS = {"greedy": GREEDY, "4 beams": replace(GREEDY, num_beams=4)}


def check(device: str, folder: Path) -> Iterator[Row]:
    no_tf32()
    for family in FAMILIES:
        config = resolve(compose(family_overrides(family, device, folder))).config.model
        model = build_module(config, torch.device("cpu"))
        initialize(model, seed=7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)  # so that one token in each place is clearly the likeliest
        prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]
        there = copy.deepcopy(model).to(device)
        for name, way in WAYS.items():
            expected, found = (generate(m, prompts, way) for m in (model, there))
            same = sum(a == b for ours, theirs in zip(found, expected, strict=True)
                       for a, b in zip(ours, theirs, strict=False))  # fmt: skip
            count = sum(map(len, expected))
            yield judged("generation", f"{family}, {name}", found == expected, f"{same} of {count} tokens")
