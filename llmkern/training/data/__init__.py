"""Data for training: documents of files, cleaned as they stream. docs/data.md shows how."""

from llmkern.training.data.cleaning import Cleaner, CleaningReport
from llmkern.training.data.duplicates import ExactDuplicates, NearDuplicates
from llmkern.training.data.quality import QualityFilter
from llmkern.training.data.repair import repair
from llmkern.training.data.sources import read_documents

__all__ = [
    "Cleaner",
    "CleaningReport",
    "ExactDuplicates",
    "NearDuplicates",
    "QualityFilter",
    "read_documents",
    "repair",
]
