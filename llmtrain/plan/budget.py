"""The best size of a model, and number of tokens, for a budget of computation (Hoffmann et al.,
arXiv:2203.15556, approach 3): the loss E + A / N^alpha + B / D^beta of N parameters and D tokens is least
under 6 · N · D FLOPs where both terms fall alike.

The constants are keys. Besiroglu et al. (arXiv:2404.10102) fit the same runs again and find others: 1.8172,
482.01, 0.3478, 2085.43 and 0.3658, which ask for more tokens of a smaller model.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError, Problem
from llmtrain.plan.estimate import Plan
from llmtrain.plan.keys import BudgetConfig
from llmtrain.plan.units import billions, duration, quantity

FLOPS = 6.0
"""FLOPs of a token and parameter, forward and backward."""


@dataclass(frozen=True)
class Budgeted:
    """What a budget buys."""

    device_hours: float
    flops: float
    """FLOPs of the model that the devices compute in that time at the plan's utilization."""
    parameters: float
    tokens: float
    loss: float
    """In nats a token, by the law."""
    steps: int
    """Steps of the planned model that the budget pays for."""
    own_tokens: float
    own_loss: float


def loss(budget: BudgetConfig, parameters: float, tokens: float) -> float:
    """Return the loss that the law gives, in nats a token."""
    of_size = budget.size_factor / parameters**budget.size_exponent
    return budget.loss_floor + of_size + budget.token_factor / tokens**budget.token_exponent


def optimum(budget: BudgetConfig, flops: float) -> tuple[float, float]:
    """Return the numbers of parameters and tokens with the least loss for this many FLOPs."""
    both = budget.size_exponent + budget.token_exponent
    ratio = (budget.size_exponent * budget.size_factor) / (budget.token_exponent * budget.token_factor)
    product = flops / FLOPS
    parameters = ratio ** (1 / both) * product ** (budget.token_exponent / both)
    return parameters, product / parameters


def budgeted(budget: BudgetConfig, plan: Plan) -> Budgeted:
    """Return what a budget buys at the speed of a plan.

    Raise ConfigError if the plan's time is not known, for less than one step, and for what the law does not
    describe.
    """
    key = "device_hours" if budget.device_hours is not None else "days"
    if other := _beside_the_law(plan):
        got = f"{getattr(budget, key):g} with {other}"
        allowed = "null: the law is of language models that learn all their weights from tokens"
        raise ConfigError(Problem(f"budget.{key}", got, allowed, f"leave budget.{key} out"))
    if plan.time is None or plan.utilization is None:
        got = f"{plan.cluster.name}, whose figures are not known"
        raise ConfigError(
            Problem("cluster", got, "a cluster with figures", "name cluster=h100_80g or another")
        )
    devices = plan.layout.world_size
    hours = budget.device_hours if budget.device_hours is not None else 24 * (budget.days or 0.0) * devices
    of_step = devices * plan.time.seconds / 3600
    steps = int(hours / of_step)
    if steps < 1:
        least = of_step if key == "device_hours" else of_step / devices / 24
        got, allowed = f"{getattr(budget, key):g}", f"{least:.3g} or more, which one step takes"
        raise ConfigError(Problem(f"budget.{key}", got, allowed, "give more, or a smaller batch.global_size"))
    tokens = float(steps * plan.tokens_per_step)
    # The law counts 6 FLOPs a parameter and token; so the computation is what the planned model does of them.
    flops = hours * 3600 * plan.cluster.peak_flops[plan.precision] * plan.utilization
    parameters, best_tokens = optimum(budget, flops)
    return Budgeted(
        hours,
        flops,
        parameters,
        best_tokens,
        loss(budget, parameters, best_tokens),
        steps,
        tokens,
        loss(budget, plan.parameters, tokens),
    )


def _beside_the_law(plan: Plan) -> str | None:
    """Return what about a plan the law does not describe; None if it describes it."""
    if plan.unit != "token":
        return f"a model of {plan.unit}s"
    if plan.model.task is not None or plan.objective.data != "tokens":
        return f"objective={plan.objective.kind}"
    return None if plan.trainable is None else "frozen parameters"


def lines(found: Budgeted, plan: Plan) -> list[str]:
    """Return lines that tell what a budget buys."""
    assert plan.time is not None
    of_run = found.steps * plan.time.seconds
    return [
        f"{'budget':<17} {found.device_hours:,.0f} device hours at {plan.utilization:.1%} of the peak: "
        f"{quantity(found.flops, 'FLOP')}",
        f"{'  best':<17} {billions(found.parameters)} parameters and {billions(found.tokens)} tokens: "
        f"a loss of {found.loss:.3f} by arXiv:2203.15556",
        f"{'  this model':<17} {billions(found.own_tokens)} tokens in train.steps={found.steps} "
        f"({duration(of_run)}): a loss of {found.own_loss:.3f}",
    ]
