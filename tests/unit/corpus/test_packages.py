import sys
from pathlib import Path

import pytest

from llmtrain.corpus.packages import resolve_package_path
from llmtrain.errors import DataError


def test_paths_that_name_no_package_stay():
    assert resolve_package_path("data/digits.csv") == Path("data/digits.csv")
    assert resolve_package_path("~/digits.csv") == Path.home() / "digits.csv"


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "package_that_must_not_run"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = resolve_package_path("package:package_that_must_not_run/data/x.csv")
    assert found == package / "data" / "x.csv"
    assert package.name not in sys.modules


@pytest.mark.parametrize("with_file", ["first", "second"])
def test_a_namespace_package_of_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_file: str):
    for name in ("first", "second"):
        (tmp_path / name / "shared_namespace").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / name)
    expected = tmp_path / with_file / "shared_namespace" / "x.csv"
    expected.touch()
    assert resolve_package_path("package:shared_namespace/x.csv") == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "package:no_such_package/x.csv",
            "no installed package 'no_such_package'; pip install no-such-package",
        ),
        ("package:os.path/x.csv", "no installed package 'os.path'"),
        ("package:string/x.csv", "string, a single module"),
        ("package:mlxtend", "an incomplete name"),
        ("package:/x.csv", "an incomplete name"),
    ],
)
def test_refusals(path: str, message: str):
    with pytest.raises(DataError) as caught:
        resolve_package_path(path)
    assert message in str(caught.value)
