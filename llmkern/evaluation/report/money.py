"""The section of costs: of a million tokens, of a year of service and what the change returns, by measured rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from llmkern.evaluation.cost import cost_per_million_tokens, return_on_acceleration, service_cost
from llmkern.evaluation.report.settings import ReportSettings

NEEDED = (
    "No price was given, so costs are relative to the published model's on the same machine. With --cost-per-hour, or "
    "--price, --lifetime-years, --power-watts and --price-per-kwh, this section has amounts."
)


def costs(speed: dict[str, Any], settings: ReportSettings, frozen: Collection[str] = ()) -> dict[str, Any]:
    """speed: of each phase, each model's figures. frozen: models that are not trained."""
    machine = settings.machine
    result: dict[str, Any] = {
        "machine": None if machine is None else dataclasses.asdict(machine),
        "currency": settings.currency,
        "utilisation": settings.utilisation,
        "note": "" if machine is not None else NEEDED,
        "phases": {},
    }
    for phase, models in speed.items():
        result["phases"][phase] = {}
        for name, figures in models.items():
            if phase == "training" and name in frozen:
                continue  # it learns nothing for that money
            ratio = figures["speedup"]
            entry: dict[str, Any] = {
                "relative": {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
            }
            if machine is not None:
                rate = figures["tokens_per_second"]
                entry["per_million_tokens"] = {
                    into: cost_per_million_tokens(machine, rate[key], utilisation=settings.utilisation)
                    for into, key in (("median", "median"), ("low", "high"), ("high", "low"))
                }
            result["phases"][phase][name] = entry
    served = next((p for p in ("decode", "prefill", "training") if speed.get(p)), None)
    if settings.tokens_per_day is None or machine is None or served is None:
        return result
    service = {
        name: service_cost(
            machine, settings.tokens_per_day, figures["tokens_per_second"]["median"], utilisation=settings.utilisation
        )
        for name, figures in speed[served].items()
    }
    result["service"] = {
        "phase": served,
        "tokens_per_day": settings.tokens_per_day,
        "models": {name: dataclasses.asdict(one) for name, one in service.items()},
    }
    if settings.investment is not None:
        first, *others = service
        result["service"]["investment"], result["service"]["years"] = settings.investment, settings.years
        result["service"]["return"] = {
            name: dataclasses.asdict(
                return_on_acceleration(service[first], service[name], settings.investment, years=settings.years)
            )
            for name in others
        }
    return result


def code(settings: ReportSettings, frozen: Collection[str] = ()) -> str:
    """The lines of Python that compute it again, of what the section of speed has found as `speed`."""
    asked = {
        field: getattr(settings, field)
        for field in ("machine", "currency", "utilisation", "tokens_per_day", "investment", "years")
    }
    given = ", ".join(f"{field}={value!r}" for field, value in asked.items() if value is not None)
    return "\n".join([
        "from llmkern.evaluation import MachineCost",
        "from llmkern.evaluation.report import ReportSettings",
        "from llmkern.evaluation.report.money import costs",
        f"told = costs(speed, ReportSettings({given}), {list(frozen)!r})",
        "print(told)",
    ])  # fmt: skip
