"""What tokens cost: of a million, of a pretraining run, of a year of service, and what an acceleration returns.

Money is in one currency, the caller's; a year has 8760 hours. Rates are to be measured ones, in tokens a second of one
machine. Whatever is not a finite number in its bounds raises, TypeError for no number and ValueError otherwise, and the
message names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkern import check

HOURS_PER_YEAR = 8760.0


def _share(name: str, value: Any) -> None:
    check.finite(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a share above 0 and up to 1, got {value}")


@dataclass(frozen=True)
class MachineCost:
    """What an hour of one machine costs, idle or not: `MachineCost(cost_per_hour)` of a rented one, or
    `MachineCost.bought(...)`.

    power_watts: what it draws while on, for the energy of a run; 0 where that is not asked for.
    """

    cost_per_hour: float
    power_watts: float = 0.0

    def __post_init__(self) -> None:
        check.above_zero("cost_per_hour", self.cost_per_hour)
        check.at_least("power_watts", self.power_watts, 0)

    @classmethod
    def bought(
        cls,
        price: float,
        lifetime_years: float,
        power_watts: float,
        price_per_kwh: float,
        *,
        power_usage_effectiveness: float = 1.0,
        upkeep_per_year: float = 0.0,
    ) -> MachineCost:
        """The price spread evenly over all hours of the lifetime, the power, and the upkeep (space, people).

        power_watts: drawn by the machine on average. power_usage_effectiveness: what the building draws for each watt
        of the machine, cooling included, at least 1.
        """
        check.above_zero("price", price)
        check.above_zero("lifetime_years", lifetime_years)
        check.above_zero("power_watts", power_watts)
        check.at_least("price_per_kwh", price_per_kwh, 0)
        check.at_least("power_usage_effectiveness", power_usage_effectiveness, 1)
        check.at_least("upkeep_per_year", upkeep_per_year, 0)
        drawn = power_watts * power_usage_effectiveness
        hour = (price / lifetime_years + upkeep_per_year) / HOURS_PER_YEAR + drawn / 1000 * price_per_kwh
        return cls(hour, drawn)


@dataclass(frozen=True)
class RunCost:
    """A run: its length in hours, the machines' hours, their energy (0 where the power is not known), the cost."""

    hours: float
    machine_hours: float
    energy_kwh: float
    cost: float


@dataclass(frozen=True)
class ServiceCost:
    """A year of service: the machines (a fraction where these are not whole), the year's cost, and that of a million of
    the tokens that are served."""

    machines: float
    cost_per_year: float
    cost_per_million_tokens: float


@dataclass(frozen=True)
class Return:
    """What an acceleration returns: saved in a year of service; return_on_investment: (what is saved in the period -
    investment) / investment; payback_years: until the investment is saved, infinite where nothing is."""

    saved_per_year: float
    return_on_investment: float
    payback_years: float


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what}: expected figures of which it is a finite number, got {value}")
    return value


def _machine(machine: Any) -> None:
    if not isinstance(machine, MachineCost):
        raise TypeError(f"machine: expected a MachineCost, got {type(machine).__name__}")


def cost_per_million_tokens(machine: MachineCost, tokens_per_second: float, *, utilisation: float = 1.0) -> float:
    """The cost of a million tokens.

    tokens_per_second: of the machine at work. utilisation: the share of the time for which it is at work, (0, 1]; the
    rest is paid too.
    """
    _machine(machine)
    check.above_zero("tokens_per_second", tokens_per_second)
    _share("utilisation", utilisation)
    return _finite("cost", machine.cost_per_hour / 3600 / (tokens_per_second * utilisation) * 1e6)


def pretraining_cost(
    machine: MachineCost, tokens: float, tokens_per_second: float, *, machines: int = 1, utilisation: float = 1.0
) -> RunCost:
    """The cost of a pretraining run over so many tokens, each epoch's counted.

    tokens_per_second: of one of the machines, as measured among so many of them: what they lose to each other is not
    modelled. utilisation: the share of the time that steps take, (0, 1]; the rest are restarts and checkpoints.
    """
    _machine(machine)
    check.above_zero("tokens", tokens)
    check.above_zero("tokens_per_second", tokens_per_second)
    check.positive("machines", machines)
    _share("utilisation", utilisation)
    machine_hours = tokens / tokens_per_second / utilisation / 3600
    energy = _finite("energy", machine_hours * machine.power_watts / 1000)
    cost = _finite("cost", machine_hours * machine.cost_per_hour)
    return RunCost(machine_hours / machines, machine_hours, energy, cost)


def service_cost(
    machine: MachineCost,
    tokens_per_day: float,
    tokens_per_second: float,
    *,
    utilisation: float = 1.0,
    whole_machines: bool = True,
) -> ServiceCost:
    """The cost of serving so many tokens every day for a year.

    utilisation: the share of the day's capacity that demand fills on average, (0, 1]; its peaks need the rest.
    whole_machines: False for machines that are paid by the part of an hour.
    """
    _machine(machine)
    check.above_zero("tokens_per_day", tokens_per_day)
    check.above_zero("tokens_per_second", tokens_per_second)
    _share("utilisation", utilisation)
    check.flag("whole_machines", whole_machines)
    needed = _finite("machines", tokens_per_day / (tokens_per_second * 86400 * utilisation))
    machines = float(math.ceil(needed)) if whole_machines else needed
    year = _finite("cost", machines * machine.cost_per_hour * HOURS_PER_YEAR)
    return ServiceCost(machines, year, year / (tokens_per_day * 365) * 1e6)


def return_on_acceleration(before: ServiceCost, after: ServiceCost, investment: float, *, years: float = 1.0) -> Return:
    """What a service gains that costs `after` where it cost `before`.

    investment: what the change costs once, above 0. years: the period for which it is counted.
    """
    for name, value in (("before", before), ("after", after)):
        if not isinstance(value, ServiceCost):
            raise TypeError(f"{name}: expected a ServiceCost, got {type(value).__name__}")
    check.above_zero("investment", investment)
    check.above_zero("years", years)
    saved = before.cost_per_year - after.cost_per_year
    payback = investment / saved if saved > 0 else math.inf
    return Return(saved, (saved * years - investment) / investment, payback)


def calculate_tech_stack_cost(config: Mapping[str, float]) -> dict[str, float]:
    """The reference's sketch, its fields and its results: total_cost, total_benefit, roi.

    config: model_size, data_size and daily_requests, at least 0, for total_cost = model_size * data_size * 1e-6 +
    model_size * daily_requests * 1e-7 + model_size * 0.1; baseline_accuracy, target_accuracy, baseline_latency,
    target_latency and satisfaction_score, any numbers, for total_benefit = (baseline_accuracy - target_accuracy) +
    (baseline_latency - target_latency) + satisfaction_score; roi = (total_benefit - total_cost) / total_cost.

    It has no units, adds accuracy to seconds, and an accuracy that rises lowers the benefit: it is kept for those who
    have it. `service_cost` and `return_on_acceleration` are of money.

    Raises TypeError for other than a mapping of numbers; ValueError for a field that is missing, negative where it must
    not be or not finite, and where the cost is 0, of which there is no return.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping of names to numbers, got {type(config).__name__}")
    sizes = ("model_size", "data_size", "daily_requests")
    rest = ("baseline_accuracy", "target_accuracy", "baseline_latency", "target_latency", "satisfaction_score")
    missing = [name for name in (*sizes, *rest) if name not in config]
    if missing:
        raise ValueError(f"config: expected the fields {', '.join((*sizes, *rest))}, got none of {', '.join(missing)}")
    for name in sizes:
        check.at_least(f"config[{name!r}]", config[name], 0)
    for name in rest:
        check.finite(f"config[{name!r}]", config[name])
    size = config["model_size"]
    cost = size * config["data_size"] * 0.000001 + size * config["daily_requests"] * 0.0000001 + size * 0.1
    benefit = (
        config["baseline_accuracy"]
        - config["target_accuracy"]
        + (config["baseline_latency"] - config["target_latency"])
        + config["satisfaction_score"]
    )
    if cost <= 0:
        raise ValueError(f"config: expected a total cost above 0, of which there is a return, got {cost}")
    return {"total_cost": cost, "total_benefit": benefit, "roi": _finite("roi", (benefit - cost) / cost)}
