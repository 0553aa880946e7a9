"""Costs against sums done by hand, and nonsense refused by name."""

from __future__ import annotations

import math

import pytest

from llmkern.evaluation import (
    MachineCost,
    ServiceCost,
    calculate_tech_stack_cost,
    cost_per_million_tokens,
    pretraining_cost,
    return_on_acceleration,
    service_cost,
)

RENTED = MachineCost(3.6, power_watts=500)  # a thousandth a second
SKETCH = {
    "model_size": 1000, "data_size": 2_000_000, "daily_requests": 50_000, "baseline_accuracy": 0.9,
    "target_accuracy": 0.7, "baseline_latency": 3.0, "target_latency": 1.0, "satisfaction_score": 4220.0,
}  # fmt: skip


def test_of_a_machine_that_is_bought():
    # 87600 over 5 years: 2 an hour; 700 W with 1.5 for each: 1.05 kWh at .2; 876 a year: .1 an hour.
    machine = MachineCost.bought(87600, 5, 700, 0.2, power_usage_effectiveness=1.5, upkeep_per_year=876)
    assert machine.cost_per_hour == pytest.approx(2.0 + 0.21 + 0.1)
    assert machine.power_watts == pytest.approx(1050)


def test_of_a_million_tokens():
    # 2000 tokens a second for a thousandth: half a millionth each.
    assert cost_per_million_tokens(RENTED, 2000) == pytest.approx(0.5)
    assert cost_per_million_tokens(RENTED, 2000, utilisation=0.25) == pytest.approx(2.0)


def test_of_a_pretraining_run():
    # 36 million at 500 a second: 20 hours at work, 25 in all, on two machines 12.5; half a kilowatt each.
    found = pretraining_cost(RENTED, 36e6, 500, machines=2, utilisation=0.8)
    assert found.hours == pytest.approx(12.5) and found.machine_hours == pytest.approx(25)
    assert found.energy_kwh == pytest.approx(12.5) and found.cost == pytest.approx(90)


def test_of_a_year_of_service():
    # 216 million a day at 1000 a second: 2.5 machines at full use.
    part = service_cost(RENTED, 216e6, 1000, whole_machines=False)
    assert part.machines == pytest.approx(2.5) and part.cost_per_year == pytest.approx(2.5 * 3.6 * 8760)
    assert part.cost_per_million_tokens == pytest.approx(cost_per_million_tokens(RENTED, 1000))
    whole = service_cost(RENTED, 216e6, 1000, utilisation=0.5)
    assert whole.machines == 5 and whole.cost_per_year == pytest.approx(5 * 3.6 * 8760)
    assert service_cost(RENTED, 216e6, 1000).machines == 3


def test_of_what_comes_back():
    before, after = ServiceCost(5, 150_000.0, 1.9), ServiceCost(2, 60_000.0, 0.8)
    found = return_on_acceleration(before, after, 30_000, years=2)
    assert found.saved_per_year == 90_000 and found.return_on_investment == pytest.approx(5.0)
    assert found.payback_years == pytest.approx(1 / 3)
    nothing = return_on_acceleration(after, after, 30_000)
    assert nothing.return_on_investment == -1.0 and nothing.payback_years == math.inf


def test_the_sketch_as_the_reference_has_it():
    found = calculate_tech_stack_cost(SKETCH)
    assert found == pytest.approx({"total_cost": 2105.0, "total_benefit": 4222.2, "roi": 4222.2 / 2105.0 - 1})


def changed(**fields):
    return lambda: calculate_tech_stack_cost({**SKETCH, **fields})


NAN, INF = math.nan, math.inf
WRONG = {
    "a cost of 0": (changed(model_size=0), ValueError, "config: expected a total cost above 0, of which"),
    "a negative size": (changed(data_size=-1), ValueError, r"config\['data_size'\]: expected a number of at least 0"),
    "a nan": (changed(target_accuracy=NAN), ValueError, r"config\['target_accuracy'\]: expected a finite number"),
    "a word": (changed(satisfaction_score="good"), TypeError, r"config\['satisfaction_score'\]: expected a number"),
    "no fields": (lambda: calculate_tech_stack_cost({}), ValueError, "got none of model_size, data_size, daily_requ"),
    "no mapping": (lambda: calculate_tech_stack_cost(3), TypeError, "config: expected a mapping"),
    "a free machine": (lambda: MachineCost(0), ValueError, "cost_per_hour: expected a number above 0, got 0"),
    "negative power": (lambda: MachineCost(1, -3), ValueError, "power_watts: expected a number of at least 0, got -3"),
    "no lifetime": (lambda: MachineCost.bought(1, 0, 1, 1), ValueError, "lifetime_years: expected a number above 0"),
    "an endless price": (lambda: MachineCost.bought(INF, 1, 1, 1), ValueError, "price: expected a finite number"),
    "cooling that gives power": (
        lambda: MachineCost.bought(1, 1, 1, 1, power_usage_effectiveness=0.9),
        ValueError, "power_usage_effectiveness: expected a number of at least 1, got 0.9",
    ),
    "over all": (lambda: cost_per_million_tokens(RENTED, 1, utilisation=1.1), ValueError, "utilisation: expected a sh"),
    "unused": (lambda: service_cost(RENTED, 1, 1, utilisation=0), ValueError, "utilisation: expected a share above 0"),
    "nan of the time": (lambda: pretraining_cost(RENTED, 1, 1, utilisation=NAN), ValueError, "utilisation: expected a"),
    "no speed": (lambda: cost_per_million_tokens(RENTED, 0), ValueError, "tokens_per_second: expected a number above"),
    "negative tokens": (lambda: pretraining_cost(RENTED, -1, 1), ValueError, "tokens: expected a number above 0, got"),
    "half a machine": (lambda: pretraining_cost(RENTED, 1, 1, machines=0.5), TypeError, "machines: expected a posit"),
    "no tokens a day": (lambda: service_cost(RENTED, 0, 1), ValueError, "tokens_per_day: expected a number above 0"),
    "a price for a machine": (lambda: service_cost(3.6, 1, 1), TypeError, "machine: expected a MachineCost, got float"),
    "nothing invested": (
        lambda: return_on_acceleration(service_cost(RENTED, 1, 1), service_cost(RENTED, 1, 2), 0),
        ValueError, "investment: expected a number above 0, got 0",
    ),
    "a price for a service": (lambda: return_on_acceleration(1, 2, 3), TypeError, "before: expected a ServiceCost"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_nonsense_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
