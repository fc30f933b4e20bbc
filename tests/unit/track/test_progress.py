import io

from rich.console import Console

from llmtrain.track.progress import Progress, duration, progress_line

METRICS = {
    "loss": 4.32149,
    "lr": 3e-4,
    "grad_norm": 1.2345,
    "tokens_per_second": 8123.4,
    "mfu": 0.3149,
    "memory_bytes": 1.5 * 2**30,
}


def test_line() -> None:
    assert progress_line(7, 100, METRICS, 3723.4) == (
        "step   7/100  loss 4.3215  lr 3.00e-04  grad norm 1.234  8,123 tokens/s  mfu 31.5%  1.50 GiB  "
        "eta 1:02:03"
    )
    assert progress_line(7, 100, {"loss": float("nan")}, None) == "step   7/100  loss nan"


def test_duration() -> None:
    assert duration(59.6) == "0:01:00"
    assert duration(4 * 86400 + 3600 + 62) == "4 d 1:01:02"


def test_a_log_gets_whole_plain_lines_every_so_often() -> None:
    log = io.StringIO()
    progress = Progress(7, every=3, console=Console(file=log, width=20))
    for step in range(1, 8):
        progress.update(step, METRICS)
    progress.message("saved [step 7]")
    progress.close()
    lines = log.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7", "saved [step 7]"]
    assert "\x1b" not in log.getvalue()
    assert all("eta 0:00:00" in line for line in lines[:3])


def test_a_terminal_keeps_one_live_line_below_messages() -> None:
    screen = io.StringIO()
    progress = Progress(
        3,
        console=Console(file=screen, force_terminal=True, width=60, color_system=None, legacy_windows=False),
    )
    progress.update(1, METRICS)
    progress.message("evaluated")
    progress.update(2, METRICS)
    progress.close()
    text = screen.getvalue()
    assert "\x1b[2K" in text, "the live line is erased and drawn anew"
    assert text.index("step 1/3") < text.index("evaluated") < text.index("step 2/3")
    assert "…" in text, "a line longer than the terminal is cut, not wrapped"


def test_time_left_does_not_count_the_first_step(monkeypatch) -> None:
    clock = iter([0.0, 10.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("llmtrain.track.progress.time.monotonic", lambda: next(clock))
    log = io.StringIO()
    progress = Progress(103, start_step=0, console=Console(file=log, width=200))
    for step in (1, 2, 3):
        progress.update(step, {})
    assert [line.split("eta ")[1] for line in log.getvalue().splitlines()] == [
        "0:17:00",
        "0:01:41",
        "0:01:40",
    ]
