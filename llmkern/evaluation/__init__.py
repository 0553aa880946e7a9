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
from llmkern.evaluation.efficiency import Efficiency, Phase, compare_efficiency, count_flops, measure_efficiency
from llmkern.evaluation.evaluator import ModelEvaluator
from llmkern.evaluation.machines import Machine, Rates
from llmkern.evaluation.recommend import Estimate, Part, Recommendation, recommend
from llmkern.evaluation.report import EvaluationReport, ReportSettings, make_report
from llmkern.evaluation.results import Classification, GenerationQuality, Likelihood
from llmkern.evaluation.shapes import Shape

__all__ = [
    "Classification",
    "Efficiency",
    "Estimate",
    "EvaluationReport",
    "GenerationQuality",
    "Likelihood",
    "Machine",
    "MachineCost",
    "ModelEvaluator",
    "Part",
    "Phase",
    "Rates",
    "Recommendation",
    "ReportSettings",
    "Return",
    "RunCost",
    "ServiceCost",
    "Shape",
    "calculate_tech_stack_cost",
    "compare_efficiency",
    "cost_per_million_tokens",
    "count_flops",
    "make_report",
    "measure_efficiency",
    "pretraining_cost",
    "recommend",
    "return_on_acceleration",
    "service_cost",
]
