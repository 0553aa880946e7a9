"""What a model is worth: its quality on one's own data, its speed, memory and cost. docs/evaluation.md."""

from llmkern.evaluation.evaluator import ModelEvaluator
from llmkern.evaluation.results import Classification, GenerationQuality, Likelihood

__all__ = [
    "Classification",
    "GenerationQuality",
    "Likelihood",
    "ModelEvaluator",
]
