"""Training a ResNet on digits: our engine and input pipeline against a bare torch loop.

    python -m tests.bench.resnet_throughput [--threads 1] [--rounds 5] [--steps 10] [key=value …]

ResNet-20 on 28×28 digits in batches of 64, cut out of 2 pixels of padding. The bare loop has the same network
of torch's own modules and weights, permutes the images once an epoch, cuts them by indices, and normalizes
them. Both take their turns of `steps` optimizer steps, each first in every other round; printed is the median
of our speed over theirs in the same round, by the processor time of all threads and by the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmtrain.engine.build import build_engine
from llmtrain.models.convolutional.resnet import ResNet
from llmtrain.nn.batch_norm import BatchNorm
from llmtrain.train.resolve import resolve
from tests.support.training import compose, open_loader

PAD = 2
SETTINGS = (
    "model=resnet20",
    "model.image_size=28",
    "model.channels=1",
    "data=mnist",
    f"objective.crop={PAD}",
    "optimizer=sgd",
    "optimizer.max_grad_norm=0",
    "schedule=constant",
    "batch.global_size=64",
    "batch.micro_size=64",
    "batch.sequence_length=1",
)


def of_torch(model: ResNet) -> nn.Module:
    """Replace our batch norms by torch's own, with their values."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNorm):
                norm = nn.BatchNorm2d(len(child.weight))
                norm.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, norm)
    return model


def bare_steps(model: nn.Module, optimizer: Any, images: np.ndarray, labels: np.ndarray, steps: int) -> None:
    """Take steps in a bare torch loop."""
    order = torch.randperm(len(images))
    whole, numbers = torch.from_numpy(images), torch.from_numpy(labels)
    for step in range(steps):
        rows = order[step * 64 % (len(order) - 64) :][:64]
        batch = F.pad((whole[rows].permute(0, 3, 1, 2).float() / 255 - 0.1307) / 0.3081, (PAD,) * 4)
        top, left = (torch.randint(0, 2 * PAD + 1, (64,)) for _ in range(2))
        down, across = top[:, None] + torch.arange(28), left[:, None] + torch.arange(28)
        cut = batch[torch.arange(64)[:, None, None], :, down[:, :, None], across[:, None]].permute(0, 3, 1, 2)
        loss = F.cross_entropy(model(cut.contiguous()), numbers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    given, overrides = parser.parse_known_args()
    torch.set_num_threads(given.threads)
    total = given.steps * (given.rounds + 1)
    resolved = resolve(compose([*SETTINGS, f"train.steps={total}", *overrides]))
    config: Any = resolved.config
    objective = config.objective.build(config.model, config.data, None)
    engine = build_engine(config, resolved.layout, torch.device("cpu"), objective, None)
    batches = open_loader(resolved, objective=objective).steps(0)
    theirs = ResNet(config.model)
    theirs.load_state_dict(engine.model.state_dict())
    theirs = of_torch(theirs).train()
    optimizer = torch.optim.SGD(
        theirs.parameters(), config.optimizer.lr, config.optimizer.momentum, fused=True
    )
    (images,) = config.objective.open(config.model, config.data, None, "train", 1).values()
    ratios = []

    def our_turn() -> None:
        for _ in range(given.steps):
            engine.train_step(next(batches).micro_batches, lr=config.optimizer.lr)

    def bare_turn() -> None:
        bare_steps(theirs, optimizer, images.pictures_NHWC, images.labels, given.steps)

    turns: list[Callable[[], None]] = [our_turn, bare_turn]
    for number in range(given.rounds + 1):
        spent = {}
        for turn in turns[:: -1 if number % 2 else 1]:
            cpu, clock = time.process_time(), time.perf_counter()
            turn()
            spent[turn] = np.array([time.process_time() - cpu, time.perf_counter() - clock])
        if number:  # the first round warms both up
            ratios.append(spent[bare_turn] / spent[our_turn])
            rates = (64 * given.steps / spent[turn][0] for turn in turns)
            print(
                "ours {:,.0f} images a CPU second, bare {:,.0f}, ratio {:.3f}; by the clock {:.3f}".format(
                    *rates, *ratios[-1]
                ),
                flush=True,
            )
    cpu_ratio, clock_ratio = np.median(ratios, axis=0)
    print(
        f"median ratio {cpu_ratio:.3f} by CPU time, {clock_ratio:.3f} by the clock, of {len(ratios)} rounds"
    )


if __name__ == "__main__":
    main()
