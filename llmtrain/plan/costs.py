"""Energy and price of a run, with the assumptions behind them."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.plan.estimate import Plan
from llmtrain.plan.units import digits


def kilowatt_hours(plan: Plan) -> float | None:
    """Return the energy of the whole run, the building's share included; None where it is not known."""
    cluster = plan.cluster
    if plan.seconds is None or cluster.watts is None:
        return None
    return plan.seconds * plan.layout.world_size * cluster.watts * cluster.pue / 3.6e6


def dollars(plan: Plan) -> float | None:
    """Return the price of the whole run; None where it is not known."""
    if plan.seconds is None or plan.cluster.price_per_hour is None:
        return None
    return plan.seconds / 3600 * plan.layout.world_size * plan.cluster.price_per_hour


def lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield name and text of each figure that is known."""
    cluster = plan.cluster
    energy, price = kilowatt_hours(plan), dollars(plan)
    if energy is not None:
        yield (
            "energy",
            f"{digits(energy, 4)} kWh, if a device with its share of a host draws {cluster.watts:g} W, "
            f"and the building {cluster.pue:g} times that",
        )
    if price is not None:
        yield "price", f"${digits(price, 4)}, at ${cluster.price_per_hour:g} an hour for a device"
