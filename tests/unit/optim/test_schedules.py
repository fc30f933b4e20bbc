import pytest

from llmtrain.optim.config import ScheduleConfig, schedule_problems
from llmtrain.optim.schedules import multiplier

WARMUP_4 = [0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    ("config", "total_steps", "expected"),
    [
        (ScheduleConfig("constant", warmup_steps=4), 8, [*WARMUP_4, 1, 1, 1, 1, 1, 1]),
        (ScheduleConfig("constant", warmup_steps=0), 3, [1, 1, 1]),
        (
            ScheduleConfig("linear", warmup_steps=4, min_ratio=0.0),
            8,
            [*WARMUP_4, 1, 0.75, 0.5, 0.25, 0, 0],
        ),
        (
            ScheduleConfig("linear", warmup_steps=0, min_ratio=0.5),
            4,
            [1, 0.875, 0.75, 0.625, 0.5],
        ),
        (
            ScheduleConfig("cosine", warmup_steps=4, min_ratio=0.0),
            8,
            [*WARMUP_4, 1, 0.8535533905932737, 0.5, 0.14644660940672627, 0, 0],
        ),
        (
            ScheduleConfig("cosine", warmup_steps=4, min_ratio=0.1),
            8,
            [*WARMUP_4, 1, 0.8681980515339464, 0.55, 0.23180194846605365, 0.1],
        ),
        (
            ScheduleConfig("wsd", warmup_steps=4, decay_steps=4, min_ratio=0.0),
            12,
            [*WARMUP_4, 1, 1, 1, 1, 1, 0.5, 0.2928932188134524, 0.1339745962155614, 0],
        ),
        (ScheduleConfig("wsd", warmup_steps=0, decay_steps=0, min_ratio=0.0), 3, [1, 1, 1, 0]),
        (ScheduleConfig("cosine", warmup_steps=4, min_ratio=0.0), 4, [*WARMUP_4, 0]),
        (ScheduleConfig("constant"), 40, [1 / 3, 2 / 3, 1]),
        (ScheduleConfig("noam", warmup_steps=4), 8, [0.25, 0.5, 0.75, 1, (4 / 5) ** 0.5, (4 / 6) ** 0.5]),
        (ScheduleConfig("noam", warmup_steps=0), 8, [1, 0.5**0.5, 3**-0.5, 0.5]),
    ],
)
def test_multiplier(config: ScheduleConfig, total_steps: int, expected: list[float]) -> None:
    assert [multiplier(config, step, total_steps) for step in range(len(expected))] == pytest.approx(expected)


def test_noam_is_the_papers_rate() -> None:
    """arXiv:1706.03762, equation 3, at its base model's 512 and 4,000."""
    D, warmup = 512, 4000
    peak = (D * warmup) ** -0.5
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        rate = D**-0.5 * min(step**-0.5, step * warmup**-1.5)
        config = ScheduleConfig("noam", warmup_steps=warmup)
        assert peak * multiplier(config, step - 1, 100_000) == pytest.approx(rate)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd", "noam"])
@pytest.mark.parametrize("total_steps", [1, 2, 19, 100, 3000])
def test_every_step_of_a_run_has_a_rate(name: str, total_steps: int) -> None:
    config = ScheduleConfig(name, min_ratio=0.0)
    assert not list(schedule_problems(config, total_steps))
    assert all(0 < multiplier(config, step, total_steps) <= 1 for step in range(total_steps))


def test_longer_than_the_run_is_a_problem() -> None:
    (problem,) = schedule_problems(ScheduleConfig("cosine", warmup_steps=11), 10)
    assert str(problem) == (
        "warmup_steps: got 11; allowed: 0 to 10, the steps of the run; null selects 5% of the run"
    )
    (problem,) = schedule_problems(ScheduleConfig("wsd", warmup_steps=4, decay_steps=7), 10)
    assert problem.where == "decay_steps"
    assert problem.allowed.startswith("0 to 6")
    assert not list(schedule_problems(ScheduleConfig("wsd", warmup_steps=4, decay_steps=6), 10))
