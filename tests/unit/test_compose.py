"""What tests compose is what the command line composes."""

from __future__ import annotations

import pytest

from tests.support.training import TINY_GPT, compose


@pytest.mark.parametrize(
    ("verb", "overrides"),
    [
        ("train", [*TINY_GPT, "data.path=/a b/c,d=e", "seed=7", "precision=bf16", "parallel.zero=3"]),
        ("train", ["batch.micro_size=4", "experiment=verses", "optimizer=sgd", "optimizer.lr=1e-3"]),
        ("train", ["train.freeze=['*.weight', a]", "data.mixture={web: 0.5, books: 0.3}", "recompute=full"]),
        ("plan", ["model=lstm", "model.hidden_size=64", "checkpoint.every=null"]),
    ],
)
def test_as_hydra_composes_it(verb: str, overrides: list[str]):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from llmtrain.cli.explain import conf_folder
    from llmtrain.cli.overrides import quote, text_keys

    quoted = [quote(override, text_keys(verb)) for override in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        expected = OmegaConf.to_container(hydra_compose(config_name=verb, overrides=quoted), resolve=True)
    assert isinstance(expected, dict)
    expected.pop("experiment", None)
    assert compose(overrides, verb) == expected
