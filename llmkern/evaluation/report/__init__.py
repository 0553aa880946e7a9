"""What a model loses and gains on llmkern, as one page that a user shows to their team. docs/report.md."""

from llmkern.evaluation.report.data import Data, read_data
from llmkern.evaluation.report.loading import Loaded, load
from llmkern.evaluation.report.making import EvaluationReport, make_report
from llmkern.evaluation.report.settings import ReportSettings

__all__ = ["Data", "EvaluationReport", "Loaded", "ReportSettings", "load", "make_report", "read_data"]
