"""What an evaluation finds."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood (natural logarithm) of all tokens that were predicted, and how many these are."""

    negative_log_likelihood: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(negative_log_likelihood / tokens); infinite where that is beyond float64."""
        mean = self.negative_log_likelihood / self.tokens
        return math.exp(mean) if mean < 709.0 or math.isnan(mean) else math.inf


@dataclass(frozen=True)
class GenerationQuality:
    """Generated texts against references.

    bleu: sacrebleu's corpus BLEU, 0 to 100. mean_sentence_bleu: the mean of sacrebleu's sentence BLEU, 0 to 100.
    rouge1, rouge2, rougeL: the means of rouge-score's F-measures, 0 to 1; of several references the best one.
    signature: sacrebleu's, which says how BLEU was formed. outputs: the continuations, in the order of the prompts.
    """

    bleu: float
    mean_sentence_bleu: float
    rouge1: float
    rouge2: float
    rougeL: float
    signature: str
    outputs: list[str]


@dataclass(frozen=True)
class Classification:
    """scikit-learn's accuracy and F1 (macro: the mean of the classes; micro: of all decisions; weighted: by the
    classes' frequency), 0 to 1, of `count` examples or, of labelled tokens, tokens."""

    accuracy: float
    f1_macro: float
    f1_micro: float
    f1_weighted: float
    count: int
