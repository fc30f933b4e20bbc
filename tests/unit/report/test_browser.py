"""The page of `llmtrain report` in a real browser without a window: what a reader sees, wide and narrow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmtrain.cli import main as cli
from tests.unit.report.test_report import runs, trained

__all__ = ["runs"]
pytestmark = pytest.mark.slow

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
LOOK = """<script>
function box(element) {
  const found = element.getBoundingClientRect();
  return {left: found.left, right: found.right, width: found.width, height: found.height};
}
window.addEventListener("load", () => {
  const seen = {
    width: document.documentElement.clientWidth,
    scrolls: document.documentElement.scrollWidth,
    charts: [...document.querySelectorAll(".charts svg")].map(box),
    tables: [...document.querySelectorAll("table")].map(box),
    titles: [...document.querySelectorAll(".charts svg text")].map(text => text.textContent),
    cells: [...document.querySelectorAll("td")].map(cell => cell.innerText),
  };
  document.documentElement.setAttribute("data-seen", JSON.stringify(seen));
});
</script>"""
"""What the browser is asked; the page itself runs no script."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = "it needs a browser (apt-get install chromium-headless-shell)"
        if os.environ.get("CI"):
            pytest.fail(f"CI must run this test: {reason}")
        pytest.skip(f"NOT TESTED HERE: {reason}")
    return found


def shown(browser: str, page: Path, width: int, *flags: str) -> str:
    """What the browser prints of a page in a window of this width."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={page.parent}/profile",
        f"--window-size={width},3000",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout


def look(browser: str, page: Path, width: int) -> dict[str, Any]:
    """The boxes and texts of a page as the browser laid them out."""
    asking = page.with_name(f"asking-{width}.html")
    asking.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    found = re.search(r'data-seen="([^"]*)"', shown(browser, asking, width, "--dump-dom"))
    assert found is not None
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (500, 1)])
def test_pictures_and_tables_are_seen(
    browser: str, runs: tuple[Path, Path], tmp_path: Path, width: int, columns: int
) -> None:
    page = tmp_path / "page.html"
    assert cli.run_verb("report", [*map(str, runs), f"output={page}"]) == 0
    seen = look(browser, page, width)
    assert seen["scrolls"] <= seen["width"], "no need to scroll sideways"
    charts = seen["charts"]
    for title in ("training loss", "validation loss", "gradient norm", "learning rate", "tokens a second"):
        assert any(text.startswith(title) for text in seen["titles"]), title
    assert {"memory (GiB)", "waiting for data (seconds a step)", "<first>"} <= set(seen["titles"])
    assert len({round(chart["left"]) for chart in charts}) == columns
    for chart in charts:
        assert chart["width"] > 300, "large enough to read"
        assert chart["height"] > 150
        assert chart["left"] >= 0
        assert chart["right"] <= seen["width"], "nothing is cut off"
    runs_table, events, differences, data = seen["tables"]
    assert max(table["right"] for table in (runs_table, events, differences, data)) <= seen["width"]
    cells = seen["cells"]
    assert {"<first>", "second", "optimizer.lr", "start", "save", "done"} <= set(cells)
    assert cells[cells.index("optimizer.lr") + 2] == "0.01"
    assert cells[cells.index("steps") + 1] == "4 of 4"

    picture = tmp_path / "page.png"
    shown(browser, page, width, f"--screenshot={picture}")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # of the two runs' curves
        assert (abs(pixels - color).max(axis=1) < 40).sum() > 50, "both curves are drawn"


def test_a_run_that_never_ended_a_step(
    browser: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss is not finite: there are no curves, but settings, events and the reason."""
    assert trained(corpus, tmp_path / "run", "train.steps=9", "optimizer.lr=1e30") == 2
    page = tmp_path / "page.html"
    assert cli.run_verb("report", [str(tmp_path / "run"), f"output={page}"]) == 0
    seen = look(browser, page, 900)
    assert "failed" in seen["cells"]
    assert "fail" in seen["cells"]
    assert seen["scrolls"] <= seen["width"]
