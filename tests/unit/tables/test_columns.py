"""Tables of numbers and categories: statistics of the training split, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.datasets.columns import LabelledRows
from llmtrain.errors import DataError
from llmtrain.tables.columns import encode_rows, measure, number_labels, read_columns
from llmtrain.tables.columns_config import ColumnDataConfig

ROWS = "height,color,label\n1.0,red,no\n2,blue,yes\n,red,yes\n6,,no\n"


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_numbers_are_standardized_and_categories_one_hot(tmp_path: Path) -> None:
    data = ColumnDataConfig(
        train=write(tmp_path, "a.csv", ROWS),
        validation=write(tmp_path, "b.csv", "label,color,height\nyes,green,3\nno,blue,4\n"),
    )
    columns, classes = measure(read_columns(data, "train"), data)
    assert classes == ("no", "yes")
    height, color = columns
    assert (height.mean, height.std) == (3.0, np.std([1, 2, 6]))
    assert color.categories == ("blue", "red")
    found = LabelledRows.open(data, "train", columns, classes).get(np.arange(4))
    scaled = [(1 - 3) / height.std, (2 - 3) / height.std, 0, (6 - 3) / height.std]
    expected = np.array([[scaled[0], 0, 1], [scaled[1], 1, 0], [scaled[2], 0, 1], [scaled[3], 0, 0]])
    np.testing.assert_allclose(found["inputs"], expected, rtol=1e-6)
    assert found["labels"].tolist() == [0, 1, 1, 0]
    # By the statistics of the training split, whatever the order of columns; green was never seen.
    held_out = LabelledRows.open(data, "validation", columns, classes).get(np.array([0, 1, -1]))
    np.testing.assert_allclose(held_out["inputs"][:2], [[0, 0, 0], [1 / height.std, 1, 0]], rtol=1e-6)
    assert held_out["labels"].tolist() == [1, 0, -1]


def test_rows_of_one_file_are_divided_by_their_values(tmp_path: Path) -> None:
    lines = [f"{i},{'ab'[i % 2]}\n" for i in range(300)]
    data = ColumnDataConfig(path=write(tmp_path, "a.csv", "x,label\n" + "".join(lines)))
    parts = [set(read_columns(data, split).columns["x"]) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 300 == len(set.union(*parts))
    again = ColumnDataConfig(path=write(tmp_path, "b.csv", "x,label\n" + "".join(reversed(lines))))
    assert set(read_columns(again, "test").columns["x"]) == parts[2]


def test_bad_tables_take_one_line(tmp_path: Path) -> None:
    def refusal(text: str, more: str | None = None, **keys: object) -> str:
        data = ColumnDataConfig(train=write(tmp_path, "a.csv", text), **keys)  # type: ignore[arg-type]

        def read() -> None:
            columns, classes = measure(read_columns(data, "train"), data)
            rows = read_columns(ColumnDataConfig(train=write(tmp_path, "b.csv", more or "")), "train")
            encode_rows(rows, columns)
            number_labels(rows, classes)

        with pytest.raises(DataError) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    # The rows that the hash holds out leave both classes in the training split.
    rows = "".join(f"{i},,{'ab'[i % 2]}\n" for i in range(40))
    assert "column note without a value" in refusal("x,note,label\n" + rows)
    assert "no field label; allowed: x, note, kind" in refusal("x,note,kind\n" + rows)
    assert "no column y" in refusal("x,note,label\n" + rows, ignored=("y",))
    assert "an empty split 'train'" in refusal("x,label\n")
    assert "1 different values in label" in refusal("x,label\n" + "1,a\n2,a\n3,a\n4,a\n")
    good = "x,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40))
    bad = "x,label\n" + "".join(f"{i},c\n" for i in range(40))
    assert "the label c; allowed:" in refusal(good, bad)
    few = "x,label\n" + "".join(f"{'few' if i % 4 else i},{'ab'[i % 2]}\n" for i in range(40))
    assert "few in x; allowed: a number" in refusal(few, numeric=("x",))
    assert "few in x; allowed: a number" in refusal(good, few)
