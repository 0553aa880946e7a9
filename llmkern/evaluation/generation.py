"""Texts that a model generates, several prompts in one batch, and how near they come to references."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.evaluation.results import GenerationQuality


def encoded(tokenizer: Any, texts: Sequence[str], what: str) -> list[list[int]]:
    """Each text's tokens, with the tokenizer's special ones.

    Raises ValueError for a text of no tokens.
    """
    rows: list[list[int]] = [list(tokenizer(text)["input_ids"]) for text in texts]
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"{what}[{number}]: expected a text of at least one token, got {texts[number]!r}")
    return rows


def batches(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Numbers of rows, the longest together, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for at in range(0, len(order), size):
        yield order[at : at + size]


def padded(rows: Sequence[list[int]], pad: int, left: bool) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, S) int64."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        where = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        ids[row, where], mask[row, where] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_token(tokenizer: Any) -> int:
    """What fills rows up, masked: the tokenizer's padding, or its end of text where it has none, or 0."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int):
            return found
    return 0


def checked_references(references: Any, count: int) -> list[list[str]]:
    """One list of references for each of so many prompts."""
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise TypeError(f"references: expected a list with an entry for each prompt, got {type(references).__name__}")
    if len(references) != count:
        raise ValueError(f"references: expected as many as prompts, {count}, got {len(references)}")
    lists = [[r] if isinstance(r, str) else list(r) for r in references]
    for number, several in enumerate(lists):
        if not several or not all(isinstance(r, str) for r in several):
            raise ValueError(f"references[{number}]: expected a text or a list of texts, got {references[number]!r}")
    return lists


def scored(outputs: list[str], references: list[list[str]]) -> GenerationQuality:
    """BLEU by sacrebleu, ROUGE by rouge-score.

    Source: Papineni et al. 2002, "BLEU"; Post 2018, "A call for clarity in reporting BLEU scores"; Lin 2004, "ROUGE".
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError(
            f'expected sacrebleu and rouge-score, which pip install "llmkern[eval]" brings: {error}'
        ) from error
    most = max(map(len, references))
    streams: list[list[Any]] = [
        [several[i] if i < len(several) else None for several in references] for i in range(most)
    ]
    corpus, sentence = BLEU(), BLEU(effective_order=True)  # the latter as sacrebleu asks for single sentences
    bleu = corpus.corpus_score(outputs, streams).score
    sentences = [sentence.sentence_score(o, several).score for o, several in zip(outputs, references, strict=True)]
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=False)
    found = [scorer.score_multi(several, o) for o, several in zip(outputs, references, strict=True)]
    rouge = {kind: statistics.fmean(one[kind].fmeasure for one in found) for kind in kinds}
    signature = str(corpus.get_signature())
    return GenerationQuality(bleu, statistics.fmean(sentences), **rouge, signature=signature, outputs=outputs)
