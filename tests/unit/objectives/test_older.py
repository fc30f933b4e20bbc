"""Models whose section held their objective, as runs and checkpoints of before say it."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config import decode, encode
from llmtrain.data.mixture import Timeline
from llmtrain.models.registry import model_config_type
from llmtrain.objectives.older import run_with_objective, separated, with_objective
from llmtrain.objectives.registry import objective_config_type

MASKED = {"pairs": "sentence_order", "share": 0.2, "masked": 0.8, "random": 0.1, "whole_words": False}
OF_PAIRS = {
    "target_length": None,
    "mean_span": 3.0,
    "share": 0.15,
    "num_sentinels": 64,
    "infilling": 0.3,
    "masking": 0.0,
    "deletion": 0.0,
    "permutation": 1.0,
    "rotation": 0.0,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gpt": ({"family": "gpt"}, {}, {"kind": "causal_lm"}),
    "lstm": ({"family": "lstm"}, {}, {"kind": "causal_lm"}),
    "simple_cnn": ({"family": "simple_cnn"}, {}, {"kind": "image_classification"}),
    "bert": ({"family": "bert", "objective": MASKED}, {"pair_head": True}, {**MASKED, "kind": "mlm"}),
    "roberta": (
        {"family": "bert", "objective": {**MASKED, "pairs": "none"}},
        {"pair_head": False},
        {**MASKED, "pairs": "none", "kind": "mlm"},
    ),
    "xlnet": (
        {"family": "xlnet", "objective": {"predict_every": 5, "max_span": 4}},
        {},
        {"kind": "permuted_lm", "predict_every": 5, "max_span": 4},
    ),
    "t5": (
        {
            "family": "seq2seq",
            "sentinel_id": 99,
            "vocab_size": 100,
            "objective": {**OF_PAIRS, "kind": "span_corruption"},
        },
        {"num_sentinels": 64},
        {"kind": "span_corruption", "mean_span": 3.0, "share": 0.15, "num_sentinels": 64},
    ),
    "transformer": (
        {"family": "seq2seq", "objective": {**OF_PAIRS, "kind": "pairs", "target_length": 40}},
        {},
        {"kind": "seq2seq", "target_length": 40},
    ),
    "bart": (
        {"family": "seq2seq", "objective": {**OF_PAIRS, "kind": "denoising", "rotation": 0.5}},
        {},
        {"kind": "denoising", "rotation": 0.5},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_objective_stands_beside_the_model(name: str) -> None:
    older, changes, objective = MODELS[name]
    model, found = separated(older)
    assert model == {**{k: v for k, v in older.items() if k != "objective"}, **changes}
    assert found is not None
    assert encode(decode(objective_config_type(found), found)).items() >= objective.items()
    decode(model_config_type(model), model)
    run = run_with_objective({"model": older, "seed": 3})
    assert run == {"model": model, "objective": found, "seed": 3}
    assert run_with_objective(run) == run, "what is said today stays"
    manifest = with_objective({"model": older, "config": {"model": older}})
    assert manifest == {"model": model, "config": {"model": model, "objective": found}}


@pytest.mark.parametrize("model", [{"family": [1]}, {"family": "seq2seq", "objective": {"kind": [1]}}, {}])
def test_what_is_no_model_raises_nothing(model: dict[str, Any]) -> None:
    """Its own decoding refuses it."""
    separated(model)


def test_the_objective_of_images_has_another_name_now():
    old = {"model": {"family": "simple_cnn"}, "objective": {"kind": "classification"}}
    assert run_with_objective(old)["objective"] == {"kind": "image_classification"}
    ours = {"model": {"family": "bert"}, "objective": {"kind": "classification"}}
    assert run_with_objective(ours) == ours


def test_keys_of_the_data_have_their_present_names() -> None:
    """In runs and checkpoints, and in the order that they recorded, by which a resume draws samples."""
    recorded = {
        "model": {"family": "gpt"},
        "data": {"shuffle_shards": 4, "on_bad_shard": "skip", "path": "c"},
    }
    wanted = {"shuffle_tars": 4, "on_bad_tar": "skip", "path": "c"}
    assert run_with_objective(recorded)["data"] == wanted
    assert run_with_objective({**recorded, "objective": {"kind": "causal_lm"}})["data"] == wanted
    [segment] = Timeline.decode(
        [
            {"step": 0, "sample": 0, "global_size": 1, "shares": {"": 1.0}, "positions": {}}
            | {"settings": {"seed": 1, "shuffle_shards": 4}}
        ]
    ).segments
    assert segment.settings == {"seed": 1, "shuffle_tars": 4}
