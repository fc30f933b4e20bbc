from torch import nn

from llmtrain.optim.freezing import freeze, freeze_problems, frozen_names

NAMES = ("embedding.weight", "blocks.0.norm.weight", "blocks.10.norm.weight", "head.weight")


def test_patterns_are_over_whole_names() -> None:
    assert frozen_names(NAMES, ["blocks.*", "head"]) == {"blocks.0.norm.weight", "blocks.10.norm.weight"}
    assert frozen_names(NAMES, ["blocks.0.*"]) == {"blocks.0.norm.weight"}
    assert frozen_names(NAMES, ["Head.*"]) == frozenset()
    assert frozen_names(NAMES, []) == frozenset()


def test_what_freezes_nothing_or_all_is_told() -> None:
    assert list(freeze_problems(NAMES, ["blocks.*", "*.norm.*"])) == []
    (problem,) = freeze_problems(NAMES, ["blocks.*", "haed.weight"])
    assert str(problem).startswith(
        "train.freeze[1]: got 'haed.weight', which no parameter's name matches; allowed: head.weight"
    )
    (problem,) = freeze_problems(NAMES, ["blocks.*", "*.weight"])
    assert "blocks.*, *.weight, all 4 parameters" in str(problem)


def test_a_tied_weight_goes_by_its_first_name() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model["head"].weight = model["embedding"].weight
    freeze(model, ["embedding.*"])
    assert not model["head"].weight.requires_grad
    assert model["head"].bias.requires_grad
