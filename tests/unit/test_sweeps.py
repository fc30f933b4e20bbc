"""Names of the folders of a sweep's jobs."""

from __future__ import annotations

from llmtrain.sweeps import MOST_CHARACTERS, job_folder


def test_a_folder_is_named_by_what_is_swept_in_any_order():
    swept = {"optimizer.lr", "seed"}
    one = job_folder(["seed=1", "run.dir=m", "+optimizer.lr=0.001"], swept)
    assert one == job_folder(["optimizer.lr=0.001", "seed=1"], swept) == "optimizer.lr=0.001,seed=1"


def test_what_else_is_trained_with_is_named_after_it():
    """Else a sweep with another value would go on from the runs of the first."""
    given = [
        "data.path=/c",
        "train.steps=9",
        "+batch.global_size=8",
        "seed=1",
        "track.wandb.notes=x",
        "run.dir=m",
    ]
    assert job_folder(given, {"seed"}) == "seed=1,batch.global_size=8,train.steps=9"
    assert job_folder(given, set()) == ""


def test_odd_and_long_values_give_safe_short_names_of_their_own():
    values = ["a/b", "a_b", "a,b", "[1,2]", "../x", "ä", "\udcff", "x" * 300, "x" * 299, "", "'a b'"]
    names = [job_folder([f"run.name={value}"], {"run.name"}) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert name.isascii()
        assert not set("/ '[]") & set(name)
        assert len(name) <= MOST_CHARACTERS + 11
