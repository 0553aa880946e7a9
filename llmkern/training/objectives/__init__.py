"""What a language model is trained to do: hidden tokens (MLM), next sentences (NSP), next tokens (CLM).

A corpus holds documents as token ids; a dataset makes examples of it; a collator makes batches of examples; `Batches`
gives them in an order that a seed and a position decide alone. docs/data.md shows them together.
"""

from llmkern.training.objectives.batches import Batches
from llmkern.training.objectives.clm import CausalLanguageModelingCollator, PackedDocuments
from llmkern.training.objectives.corpus import Corpus
from llmkern.training.objectives.mlm import MaskedLanguageModelingCollator, TextBlocks
from llmkern.training.objectives.nsp import NextSentenceCollator, SentencePairs

__all__ = [
    "Batches",
    "CausalLanguageModelingCollator",
    "Corpus",
    "MaskedLanguageModelingCollator",
    "NextSentenceCollator",
    "PackedDocuments",
    "SentencePairs",
    "TextBlocks",
]
