"""What a report is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from llmkern import check
from llmkern.evaluation import efficiency, running
from llmkern.evaluation.cost import MachineCost
from llmkern.int8.scheme import named

#: Tokens of the data that count where nothing else is asked for: a masked one is a forward row of its own.
TOKENS = {"decoder": 4096, "masked": 512, "encoder": 8192, "classifier": 16384, "encoder_decoder": 4096}


@dataclass(frozen=True)
class ReportSettings:
    """What `make_report` measures, and how thoroughly.

    schemes: of int8, each a model beside the published and the kernelized one; none of those that need calibration
    data. gradients: whether equivalence is held for the gradients of all parameters too.

    tokens: how many of the data's tokens count, None for a number that suits the kind of model. window, stride: of a
    perplexity, as of `ModelEvaluator.likelihood`; None for the most that the model takes, at most 512, and half of it.
    max_new_tokens: of each text that is generated.

    phases, prompt_tokens, batch_size, rounds, precision: as of `measure_efficiency`; None for the phases that a model
    of its kind has without training, and for 128 tokens or as many as it has room for.

    machine: what its hours cost, None where that is not known; costs are then relative to the published model's.
    currency: written behind amounts. utilisation: the share of the time for which the machine is at work, (0, 1].
    tokens_per_day: to be served, None where that is not asked for. investment, years: what the change costs once, and
    the period for which its return is counted.

    Raises TypeError and ValueError that name the field.
    """

    schemes: tuple[str, ...] = ("outliers",)
    gradients: bool = False
    tokens: int | None = None
    window: int | None = None
    stride: int | None = None
    max_new_tokens: int = 64
    phases: tuple[str, ...] | None = None
    prompt_tokens: int | None = None
    batch_size: int = 1
    rounds: int = 21
    precision: str = "float32"
    machine: MachineCost | None = None
    currency: str = ""
    utilisation: float = 1.0
    tokens_per_day: float | None = None
    investment: float | None = None
    years: float = 1.0

    def __post_init__(self) -> None:
        for field in ("schemes", "phases"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, tuple):
                raise TypeError(f"{field}: expected a tuple of names, got {value!r}")
        for scheme in self.schemes:
            if named(scheme).calibrated:
                raise ValueError(f"schemes: expected those that need no calibration data, got {scheme!r}")
        if len(set(self.schemes)) < len(self.schemes):
            raise ValueError(f"schemes: expected each once, got {', '.join(self.schemes)}")
        check.flag("gradients", self.gradients)
        for field in ("tokens", "window", "stride", "prompt_tokens"):
            if getattr(self, field) is not None:
                check.positive(field, getattr(self, field))
        for field in ("max_new_tokens", "batch_size", "rounds"):
            check.positive(field, getattr(self, field))
        if self.window is not None and self.window < 2:
            raise ValueError(f"window: expected at least 2, got {self.window}")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride: expected at most window = {self.window}, got {self.stride}")
        for phase in self.phases or ():
            check.one_of("phases", phase, efficiency.PHASES)
        check.one_of("precision", self.precision, running.PRECISIONS)
        if self.machine is not None and not isinstance(self.machine, MachineCost):
            raise TypeError(f"machine: expected a MachineCost or None, got {type(self.machine).__name__}")
        check.text("currency", self.currency)
        for field in ("utilisation", "tokens_per_day", "investment", "years"):
            value = getattr(self, field)
            if value is None:
                continue
            check.finite(field, value)
            if field == "investment" and value == 0:
                raise ValueError("investment: expected an amount above 0, of which there is a return, got 0")
            if value <= 0:
                raise ValueError(f"{field}: expected a number above 0, got {value}")
        if self.utilisation > 1:
            raise ValueError(f"utilisation: expected a share above 0 and up to 1, got {self.utilisation}")
        for field in ("tokens_per_day", "investment"):
            if getattr(self, field) is not None and self.machine is None:
                raise ValueError(f"{field}: expected a machine's cost beside it, got none")
        if self.investment is not None and self.tokens_per_day is None:
            raise ValueError("investment: expected tokens_per_day beside it, got none")
