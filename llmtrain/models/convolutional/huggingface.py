"""Residual networks in folders of transformers (`ResNetForImageClassification`)."""

from __future__ import annotations

from typing import Any

from llmtrain.models.convolutional.resnet import ResNet
from llmtrain.models.convolutional.resnet_config import ResNetConfig
from llmtrain.models.huggingface.form import Entry, Form, Settings, same, same_all

_OF_NORM = ("weight", "bias", "running_mean", "running_var")
_EMBEDDER, _ENCODER = "resnet.embedder.embedder", "resnet.encoder.stages"


def _entries(config: ResNetConfig) -> list[Entry]:
    entries = same_all({"head": "classifier.1"})
    for each in config.convolutions():
        theirs = _their_name(each.name)
        entries.append(same(f"{each.name}.convolution.weight", f"{theirs}.convolution.weight"))
        entries += same_all({f"{each.name}.norm": f"{theirs}.normalization"}, _OF_NORM)
    return entries


def _their_name(ours: str) -> str:
    if ours == "stem":
        return _EMBEDDER
    _, stage, block, *inside = ours.split(".")
    within = "shortcut" if inside == ["shortcut"] else f"layer.{inside[1]}"
    return f"{_ENCODER}.{stage}.layers.{block}.{within}"


def _misfits(config: ResNetConfig) -> dict[str, str]:
    misfits = {} if config.stem == "imagenet" else {"stem": "imagenet"}
    return misfits if config.shortcut == "projection" else {**misfits, "shortcut": "projection"}


def _write(config: ResNetConfig) -> dict[str, Any]:
    names = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
    return {
        "architectures": ["ResNetForImageClassification"],
        "num_channels": config.channels,
        "embedding_size": config.stem_width,
        "hidden_sizes": list(config.widths),
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
    }


def _read(theirs: Settings) -> dict[str, Any]:
    theirs.require("hidden_act", "relu")
    theirs.require("downsample_in_first_stage", False)
    theirs.require("downsample_in_bottleneck", False)
    named = theirs.section("id2label").content
    # Without names transformers has two classes.
    return {
        "family": "resnet",
        "block": theirs.choice("layer_type", {"basic": "basic", "bottleneck": "bottleneck"}, "bottleneck"),
        "depths": [int(depth) for depth in theirs.numbers("depths")],
        "widths": [int(width) for width in theirs.numbers("hidden_sizes")],
        "stem_width": theirs.whole("embedding_size", 64),
        "channels": theirs.whole("num_channels", 3),
        "num_classes": len(named) or theirs.whole("num_labels", 2),
    }


RESNET = Form("resnet", ResNetConfig, ResNet, _misfits, _entries, _write, _read)
