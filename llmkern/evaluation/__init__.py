"""What a model is worth: its quality on one's own data, its speed, memory and cost. docs/evaluation.md."""

from llmkern.evaluation.cost import (
    MachineCost,
    Return,
    RunCost,
    ServiceCost,
    calculate_tech_stack_cost,
    cost_per_million_tokens,
    pretraining_cost,
    return_on_acceleration,
    service_cost,
)
from llmkern.evaluation.evaluator import ModelEvaluator
from llmkern.evaluation.results import Classification, GenerationQuality, Likelihood

__all__ = [
    "Classification",
    "GenerationQuality",
    "Likelihood",
    "MachineCost",
    "ModelEvaluator",
    "Return",
    "RunCost",
    "ServiceCost",
    "calculate_tech_stack_cost",
    "cost_per_million_tokens",
    "pretraining_cost",
    "return_on_acceleration",
    "service_cost",
]
