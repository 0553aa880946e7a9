"""Pretraining: models from a configuration, their objectives, and a trainer on torch's own engines."""

from __future__ import annotations

from typing import Any

from llmkern.training.base import ModelOutput
from llmkern.training.configuration import PretrainingConfig
from llmkern.training.distributed import DistributedTrainer
from llmkern.training.models import build_model
from llmkern.training.step import MixedPrecisionTrainer, NonFiniteLossError
from llmkern.training.trainer import Trainer

__all__ = [
    "DistillationLoss",
    "DistributedTrainer",
    "MixedPrecisionTrainer",
    "ModelOutput",
    "NonFiniteLossError",
    "PretrainingConfig",
    "Trainer",
    "build_model",
]


def __getattr__(name: str) -> Any:
    if name == "DistillationLoss":
        from llmkern.loss import DistillationLoss

        return DistillationLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
