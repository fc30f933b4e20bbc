"""`llmtrain data trace` and `digest`, mistakes of all its verbs, and runs' folders that others made."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main as cli
from llmtrain.cli.verbs import SECOND_VERBS
from tests.support.corpora import random_documents, write_corpus
from tests.support.data_verbs import call, train
from tests.support.servers import FileServer


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mixture of two corpora in data/ and in run/ a run of six steps over it: four, and two
    more with rows and steps of other sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, name in enumerate(("books", "web")):
        write_corpus(folder / "data" / name, {"train": random_documents(60, seed)}, samples_per_tar=2)
    fixed = (f"data.path={folder / 'data'}", f"run.dir={folder / 'run'}", "data.shuffle_tars=2")
    mixture = "data.mixture={books: 1, web: 2}"
    train(*fixed, mixture, "train.steps=4")
    train(*fixed, mixture, "data.packing=best_fit", "batch.global_size=4", "train.steps=6")
    return folder


@pytest.fixture
def copy(mixed: Path, tmp_path: Path) -> Path:
    """The run in a folder of its own, to spoil; its data stay where they are."""
    return Path(shutil.copytree(mixed / "run", tmp_path / "run"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spoil_metrics(run: Path, *, drop: tuple[int, ...] = (), add: tuple[dict[str, Any], ...] = ()) -> None:
    """Rewrite the run's metrics without the lines of some steps and with other lines at the end."""
    kept = [record for record in read_lines(run / "metrics.jsonl") if record["step"] not in drop]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*kept, *add]))


def test_trace_of_a_step_is_a_table(mixed: Path, capsys: pytest.CaptureFixture[str]):
    code, lines, problems = call(capsys, "trace", mixed / "run", "step=2")
    assert (code, problems) == (0, [])
    header, *rows, verdict = lines
    assert header.split() == ["sample", "corpus", "epoch", "row", "tar", "document", "tokens"]
    assert {int(row.split()[0]) for row in rows} == set(range(8, 16))
    assert {row.split()[1] for row in rows} <= {"books", "web"}
    assert all(re.fullmatch(r"train-00000\d\.tar", row.split()[4]) for row in rows)
    recorded = read_lines(mixed / "run" / "metrics.jsonl")[1]
    assert (recorded["step"], verdict) == (2, f"step 2: data_digest {recorded['data_digest']}, as recorded")


def test_trace_follows_a_run_over_its_changes(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "trace.jsonl"
    code, lines, _ = call(capsys, "trace", f"run={mixed / 'run'}", "step=1:6", f"output={output}")
    assert code == 0
    assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in range(1, 7)]
    assert all(line.endswith("as recorded") for line in lines)
    records = read_lines(output)
    assert list(dict.fromkeys(r["sample"] for r in records)) == list(range(4 * 8 + 2 * 4))
    assert {r["sample"] for r in records if r["step"] > 4} == set(range(32, 40))
    tokens = dict.fromkeys(range(40), 0)
    for record in records:
        tokens[record["sample"]] += record["tokens"]
        assert record["tar"].startswith(f"{mixed / 'data' / record['corpus'] / 'train'}/")
    assert max(tokens.values()) == 33
    assert min(tokens.values()) > 0
    # Twice as many tokens are asked of one corpus as of the other.
    web = len({r["sample"] for r in records if r["corpus"] == "web"})
    assert 24 <= web <= 30


def test_trace_says_when_the_digest_is_another(copy: Path, capsys: pytest.CaptureFixture[str]):
    spoil_metrics(copy, drop=(5,), add=({"step": 3, "data_digest": 17}, {"step": 3, "validation_loss": 1.0}))
    code, lines, _ = call(capsys, "trace", copy, "step=3")
    assert code == 1
    assert lines[-1].endswith("recorded was 17: these are not the data that the run read")
    code, lines, _ = call(capsys, "trace", copy, "step=5")
    assert code == 0
    assert lines[-1].endswith("none was recorded")


def test_a_corpus_that_moved_or_changed(
    mixed: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = shutil.copytree(mixed / "data", tmp_path / "moved")
    facts = json.loads((copy / "data.json").read_text())
    facts["paths"] = {name: f"gone/{name}" for name in facts["paths"]}
    (copy / "data.json").write_text(json.dumps(facts))
    code, _, problems = call(capsys, "trace", copy, "step=6")
    assert code == 2
    assert all(" no such folder" in problem for problem in problems)
    assert len(problems) == 2
    assert call(capsys, "trace", copy, "step=6", f"data.path={moved}")[0] == 0
    places = f"data.sources={{books: {moved}/books, web: {mixed}/data/web}}"
    assert call(capsys, "trace", copy, "step=6", places)[0] == 0

    write_corpus(moved / "web", {"train": random_documents(60, seed=9)}, samples_per_tar=2)
    code, _, (problem,) = call(capsys, "trace", copy, "step=6", f"data.path={moved}")
    assert code == 2
    assert f"{moved}/web: got other data than those of the step" in problem
    assert "data.sources.web=…" in problem


def test_a_path_is_looked_for_where_the_run_was_started(
    mixed: Path,
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    for name, key, value in [
        ("data.json", "paths", {"books": "data/books", "web": "data/web"}),
        ("environment.json", "folder", str(mixed)),
    ]:
        facts = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**facts, key: value}))
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "trace", copy, "step=6")[0] == 0


def test_digest(mixed: Path, copy: Path, capsys: pytest.CaptureFixture[str]):
    code, (line,), _ = call(capsys, "digest", mixed / "run")
    assert code == 0
    assert re.fullmatch(r"[0-9a-f]{32}  steps 1 to 6", line)
    _, (shorter,), _ = call(capsys, "digest", mixed / "run", "steps=4")
    assert shorter[:32] != line[:32]
    assert shorter.endswith("steps 1 to 4")

    # Of several lines of a step the last counts, as after a resume.
    again = read_lines(copy / "metrics.jsonl")[2]
    spoil_metrics(copy, add=({"step": 3, "data_digest": 1}, again))
    assert call(capsys, "digest", copy)[1] == [line]
    spoil_metrics(copy, add=({"step": 3, "data_digest": 1},))
    assert call(capsys, "digest", copy)[1] != [line]

    spoil_metrics(copy, drop=(2, 4, 5))
    code, _, (problem,) = call(capsys, "digest", copy, "steps=7")
    assert code == 2
    assert "metrics.jsonl: got no data_digest of steps 2, 4 to 5, 7; allowed: one of each step" in problem
    (copy / "metrics.jsonl").unlink()
    assert "got no step with a data_digest" in call(capsys, "digest", copy)[2][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trce", "RUN"], ["llmtrain data: got 'trce'", "trace"]),
        (["trace"], ["run: got nothing", "llmtrain data trace RUN"]),
        (["trace", "step=2"], ["run: got nothing", "a run folder"]),
        (["trace", "RUN"], ["step: got nothing", "give step=…"]),
        (["trace", "RUN", "step=7"], ["step: got 7; allowed: 1 to 6"]),
        (["trace", "RUN", "step=5:9"], ["step: got 9; allowed: 1 to 6"]),
        (["trace", "RUN", "step=0"], ["step: got '0'; allowed: N, or FIRST:LAST"]),
        (["trace", "RUN", "step=3:2"], ["step: got '3:2'"]),
        (["trace", "RUN", "step=last"], ["step: got 'last'"]),
        (["trace", "RUN", "step=1", "data.sources={wbe: x}"], ["data.sources.wbe", "books, web"]),
        (["trace", "RUN", "step=1", "output=/no/such/file"], ["output=/no/such/file"]),
        (["trace", "RUN", "stp=1"], ["stp", "an unknown key", "step"]),
        (["trace", "/no/such", "step=1"], ["/no/such: got no such folder", "the folder of a run"]),
        (["trace", "RUN/checkpoints", "step=1"], ["got a folder without config.yaml"]),
        (["show"], ["run: got nothing", "give run=… or data.path=…"]),
        (["show", "RUN", "seed=3"], ["seed: got 3", "what the run had"]),
        (["show", "RUN", "data.packing=best_fit"], ["data.packing: got best_fit", "what the run had"]),
        (["show", "data.path=x", "step=3"], ["step: got 3", "nothing without a run"]),
        (["show", "data.path=/no/such"], ["/no/such", "llmtrain prepare"]),
        (["show", "data=mnist"], ["data.kind: got images"]),
        (["digest", "/no/such"], ["/no/such: got no such folder"]),
        (["digest", "RUN", "steps=0"], ["steps: got 0"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes(mixed: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]):
    code, _, (problem,) = call(capsys, *(word.replace("RUN", str(mixed / "run")) for word in arguments))
    assert code == 2
    for word in words:
        assert word in problem


def test_files_that_tell_too_little(copy: Path, capsys: pytest.CaptureFixture[str]):
    facts = json.loads((copy / "data.json").read_text())
    del facts["timeline"]
    (copy / "data.json").write_text(json.dumps(facts))
    assert "a run of before streams were recorded" in call(capsys, "trace", copy, "step=1")[2][0]
    (copy / "data.json").write_text("{")
    assert "data.json: got an unreadable file" in call(capsys, "trace", copy, "step=1")[2][0]
    (copy / "data.json").write_text("[]")
    assert (
        "data.json: got an unreadable file (a list instead of an object)"
        in call(capsys, "trace", copy, "step=1")[2][0]
    )


def test_a_source_that_left_is_asked_for(mixed: Path, copy: Path, capsys: pytest.CaptureFixture[str]):
    """data.json names the places of the last start alone."""
    facts = json.loads((copy / "data.json").read_text())
    del facts["paths"]["books"]
    (copy / "data.json").write_text(json.dumps(facts))
    code, _, (problem,) = call(capsys, "trace", copy, "step=1")
    assert code == 2
    assert "the location of a corpus that left the run; give data.sources.books=…" in problem
    assert call(capsys, "trace", copy, "step=1", f"data.sources.books={mixed / 'data/books'}")[0] == 0


def test_help(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("data", ["--help"]) == 0
    shown = capsys.readouterr().out
    for verb, (keys, purpose) in SECOND_VERBS["data"].items():
        assert re.search(rf"^  {verb} {re.escape(keys)} +{re.escape(purpose)}$", shown, re.MULTILINE)
        with pytest.raises(SystemExit):  # Hydra's own
            cli.run_verb("data", [verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: llmtrain data {verb} {keys} [key=value …]\n")


def test_an_address_that_a_run_names_is_not_fetched_unasked(
    mixed: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache = tmp_path / "cache"
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["cache"] = {"dir": str(tmp_path / "theirs")}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with FileServer(mixed / "data") as server:
        facts = json.loads((copy / "data.json").read_text())
        facts["paths"] = {name: f"{server.url}/{name}" for name in facts["paths"]}
        (copy / "data.json").write_text(json.dumps(facts))
        for verb in ("trace", "show"):
            code, _, (problem, *_) = call(capsys, verb, copy, "step=1")
            assert code == 2
            assert f"{server.url}/books, which the run's folder names" in problem
            assert f"give data.sources.books={server.url}/books if you trust it" in problem
        assert server.log == []
        asked = f"data.sources={{books: '{server.url}/books', web: '{server.url}/web'}}"
        assert call(capsys, "trace", copy, "step=1", asked, f"data.cache.dir={cache}")[0] == 0
        assert (
            call(capsys, "show", copy, "step=1", asked, f"data.cache.dir={cache}")[0] == 2
        )  # no real tokenizer
    assert list(cache.glob("*.used"))
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", "a: [", "config.yaml: got an unreadable file (invalid YAML: "),
        ("config.yaml", "[1]", "a list instead of a section of keys"),
        ("config.yaml", "a: \x1b[2J", "invalid YAML: "),
        ("config.yaml", "a: " + "9" * 10_000, "invalid YAML: an invalid date or number"),
        ("config.yaml", "a: 2001-99-99", "invalid YAML: an invalid date or number"),
        ("config.yaml", "[" * 100_000, "got an unreadable file ("),
        ("config.yaml", "a: &a [*a, *a]", "aliases that expand to more than 100,000 values"),
        (
            "config.yaml",
            "data: {}\nmodel: {}\ntrain: {steps: many}",
            "train.steps: got 'many'; allowed: a whole",
        ),
        (
            "config.yaml",
            "data: {}\nmodel: []\ntrain: {steps: 1}",
            "model: got []; allowed: a section of keys",
        ),
        ("config.yaml", "data: {kind: 3}\nmodel: {}\ntrain: {steps: 1}", "config.yaml: data."),
        (
            "config.yaml",
            "data: {}\nmodel: {family: [1]}\ntrain: {steps: 1}",
            "config.yaml: model.family: got",
        ),
        ("data.json", "{", "data.json: got an unreadable file (invalid JSON: "),
        ("data.json", '{"timeline": 3}', "data.json: timeline: got 3; allowed: a list"),
        (
            "data.json",
            '{"timeline": [{}]}',
            "data.json: timeline[0].step: got nothing; allowed: a whole number",
        ),
        ("data.json", '{"paths": {"a": 3}}', "data.json: paths.a: got 3; allowed: text"),
        ("environment.json", "[]", "environment.json: got an unreadable file (a list instead of an object)"),
        ("environment.json", '{"folder": 3}', "environment.json: folder: got 3; allowed: text"),
    ],
)
def test_files_of_a_run_that_say_other_things(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
):
    (copy / name).write_text(content)
    code, _, problems = call(capsys, "trace", copy, "step=1")
    assert code == 2
    assert any(said in problem for problem in problems), problems
    assert all(problem.isprintable() for problem in problems)


def test_aliases_that_multiply_take_no_time(copy: Path, capsys: pytest.CaptureFixture[str]):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (copy / "config.yaml").write_text("\n".join(lines))
    code, _, (problem,) = call(capsys, "trace", copy, "step=1")
    assert code == 2
    assert "aliases that expand to more than 100,000 values" in problem


@pytest.mark.parametrize("step", [10**12, 10**30])
def test_a_step_beyond_all_others_takes_no_memory(copy: Path, capsys: pytest.CaptureFixture[str], step: int):
    spoil_metrics(copy, add=({"step": step, "data_digest": 17},))
    code, lines, problems = call(capsys, "digest", copy)
    if step < 2**63:
        assert code == 2
        assert "no data_digest of steps 7 to 999999999999" in problems[0]
    else:
        assert (code, lines[0].split("  ")[1]) == (0, "steps 1 to 6")


def test_metrics_of_somebody_else(copy: Path, capsys: pytest.CaptureFixture[str]):
    """Lines that are none of a run are left out, however long or deep."""
    expected = call(capsys, "digest", copy)
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b"[" * 200_000 + b"\n" + b"x" * (3 << 20) + b"\n")
        file.write(b'{"step": true, "data_digest": 1}\n{"step": "7"}\n{"step": -1, "data_digest": 1}\n')
        file.write(b'{"step": 2, "data_digest": {"a": 1}}\n{"step": 2, "data_digest": "5"}\n\xff\n')
    assert call(capsys, "digest", copy) == expected


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "environment.json", "metrics.jsonl"])
def test_a_pipe_in_a_run_is_no_file_of_it(copy: Path, capsys: pytest.CaptureFixture[str], name: str):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    code, _, (problem,) = call(capsys, "trace", copy, "step=1")
    assert code == 2
    assert f"{copy / name}: got " in problem
    assert "a pipe, not a file" in problem
