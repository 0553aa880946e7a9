"""The quality of models on the data, as fits their kind: likelihood, generated texts, classes or embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern.evaluation import generation, running, scoring
from llmkern.evaluation.evaluator import ModelEvaluator
from llmkern.evaluation.report.data import Data

#: What data can tell of which kind of model, and by which measure.
MEASURES = {
    ("decoder", "texts"): "perplexity",
    ("decoder", "pairs"): "generation",
    ("encoder_decoder", "pairs"): "generation",
    ("masked", "texts"): "pseudo-perplexity",
    ("encoder", "texts"): "embeddings",
    ("classifier", "labels"): "classification",
}
#: Of each measure its figures: field, title, unit, how it changes (None: it is a comparison itself), what is better.
FIGURES: dict[str, tuple[tuple[str, str, str, str | None, str], ...]] = {
    "perplexity": (("perplexity", "perplexity", "score", "relative", "lower"),),
    "pseudo-perplexity": (("perplexity", "pseudo-perplexity", "score", "relative", "lower"),),
    "generation": (
        ("bleu", "BLEU", "score", "absolute", "higher"),
        ("mean_sentence_bleu", "BLEU, mean of sentences", "score", "absolute", "higher"),
        ("rouge1", "ROUGE-1", "score", "absolute", "higher"),
        ("rouge2", "ROUGE-2", "score", "absolute", "higher"),
        ("rougeL", "ROUGE-L", "score", "absolute", "higher"),
    ),
    "classification": (
        ("accuracy", "accuracy", "score", "absolute", "higher"),
        ("f1_macro", "F1, macro", "score", "absolute", "higher"),
        ("f1_weighted", "F1, weighted", "score", "absolute", "higher"),
    ),
    "embeddings": (
        ("cosine_mean", "cosine, mean", "cosine", None, "higher"),
        ("cosine_least", "cosine, least", "cosine", None, "higher"),
        ("neighbours_kept", "5 nearest kept", "share", None, "higher"),
    ),
}


def measure_of(kind: str, format: str) -> str:
    """Raises ValueError where data of that format says nothing of a model of that kind."""
    found = MEASURES.get((kind, "texts" if format == "text" else format))
    if found is None:
        wanted = sorted({form for k, form in MEASURES if k == kind})
        raise ValueError(
            f"data: expected {' or '.join(_NAMED[w] for w in wanted)} for {_KINDS[kind]}, got {_NAMED[format]}"
        )
    return found


_NAMED = {
    "text": "text", "texts": 'text or lines of {"text"}', "pairs": 'lines of {"prompt", "reference"}',
    "labels": 'lines of {"text", "label"}',
}  # fmt: skip
_KINDS = {
    "decoder": "a decoder", "encoder_decoder": "an encoder-decoder",
    "masked": "an encoder with a language model's head", "encoder": "an encoder without a head",
    "classifier": "a classifier",
}  # fmt: skip


def labels_of(model: Any, data: Data) -> list[int]:
    """The classes' numbers. Raises ValueError for a name that the model has not, or a number beyond its classes."""
    names: dict[str, int] = dict(getattr(model.config, "label2id", None) or {})
    classes = int(model.config.num_labels)
    found = []
    for number, label in enumerate(data.column("label")):
        place = names.get(label) if isinstance(label, str) else label
        if place is None or not 0 <= place < classes:
            expected = f"one of {', '.join(names)}" if isinstance(label, str) else f"0 to {classes - 1}"
            raise ValueError(f"data: record {number + 1}: expected the label {expected}, got {label!r}")
        found.append(place)
    return found


def class_batches(tokenizer: Any, texts: list[str], labels: list[int], size: int = 16) -> list[dict[str, Tensor]]:
    """Batches of texts padded right, with labels (B,)."""
    rows = generation.encoded(tokenizer, texts, "texts")
    pad, found = generation.pad_token(tokenizer), []
    for part in generation.batches(rows, size):
        batch = generation.padded([rows[i] for i in part], pad, left=False)
        found.append({**batch, "labels": torch.tensor([labels[i] for i in part])})
    return found


def embeddings(model: nn.Module, tokenizer: Any, texts: list[str], *, precision: str = "float32") -> Tensor:
    """(N, W) float64 embeddings of unit length: the mean of the last hidden states over each text's tokens."""
    rows = generation.encoded(tokenizer, texts, "texts")
    pad, device = generation.pad_token(tokenizer), running.device_of(model)
    found: dict[int, Tensor] = {}
    with running.evaluating(model, precision):
        for part in generation.batches(rows, 32):
            batch = running.tensors(generation.padded([rows[i] for i in part], pad, left=False), device)
            output = model(**batch)
            hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else running.logits_of(output)
            weight = batch["attention_mask"][..., None].double()
            mean = (hidden.double() * weight).sum(1) / weight.sum(1)
            found.update(zip(part, F.normalize(mean, dim=-1).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def neighbours_kept(rows: Tensor, first: Tensor, count: int = 5) -> float | None:
    """The share of each text's `count` nearest others among the rows of `first` that are so among `rows`, both (N, W)
    of unit length; None for too few texts."""
    if len(rows) <= count:
        return None
    found, wanted = (
        (x @ x.T).fill_diagonal_(-torch.inf).topk(count, dim=-1).indices for x in (rows, first)
    )  # fmt: skip
    return float((found[:, :, None] == wanted[:, None, :]).any(1).double().mean())


def measure(
    models: dict[str, Any], tokenizer: Any, data: Data, measure: str, options: dict[str, Any], precision: str,
    step: Callable[[str], Any] = lambda name: None,
) -> dict[str, Any]:  # fmt: skip
    """The measure's figures for each model, and how they differ from the first one's; of one that fails, why."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    first: Any = None
    for name, model in models.items():
        step(name)
        evaluator = ModelEvaluator(model, tokenizer, precision=precision)
        try:
            if measure == "embeddings":
                own = embeddings(model, tokenizer, data.column("text"), precision=precision)
                first = own if first is None else first
                alike = (own * first).sum(-1)
                found[name] = {
                    "cosine_mean": float(alike.mean()), "cosine_least": float(alike.min()),
                    "neighbours_kept": neighbours_kept(own, first),
                }  # fmt: skip
            else:
                found[name] = _MEASURED[measure](evaluator, data, options)
        except Exception as error:  # whatever a model cannot do is its result
            failed[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    base = found.get(next(iter(models)))
    for figures in found.values():
        for field, _, _, change, _ in FIGURES[measure]:
            if change and base is not None:
                before, after = base[field], figures[field]
                figures[f"{field}_change"] = after / before - 1 if change == "relative" else after - before
    return {
        "measure": measure, "options": options, "precision": precision, "models": found, "failed": failed,
        "figures": [
            dict(zip(("field", "title", "unit", "change", "better"), one, strict=True)) for one in FIGURES[measure]
        ],
    }  # fmt: skip


def _perplexity(evaluator: ModelEvaluator, data: Data, options: dict[str, Any]) -> dict[str, Any]:
    found = evaluator.likelihood(data.column("text"), **options)
    return {
        "perplexity": found.perplexity,
        "negative_log_likelihood": found.negative_log_likelihood,
        "predicted": found.tokens,
    }


def _pseudo_perplexity(evaluator: ModelEvaluator, data: Data, options: dict[str, Any]) -> dict[str, Any]:
    return {"perplexity": evaluator.evaluate_pseudo_perplexity(data.column("text"), **options)}


def _generation(evaluator: ModelEvaluator, data: Data, options: dict[str, Any]) -> dict[str, Any]:
    found = evaluator.evaluate_generation_quality(data.column("prompt"), data.column("reference"), **options)
    return dataclasses.asdict(found)


def _classification(evaluator: ModelEvaluator, data: Data, options: dict[str, Any]) -> dict[str, Any]:
    labels = labels_of(evaluator.model, data)
    batches = class_batches(evaluator.tokenizer, data.column("text"), labels)
    return dataclasses.asdict(evaluator.evaluate_classification(batches))


_MEASURED = {
    "perplexity": _perplexity,
    "pseudo-perplexity": _pseudo_perplexity,
    "generation": _generation,
    "classification": _classification,
}
_CALLS = {
    "perplexity": "likelihood(data.column('text'){options}).perplexity",
    "pseudo-perplexity": "evaluate_pseudo_perplexity(data.column('text'){options})",
    "generation": "evaluate_generation_quality(data.column('prompt'), data.column('reference'){options})",
    "classification": "evaluate_classification(batches)",
}


def code(measure: str, options: dict[str, Any], precision: str) -> str:
    """The lines of Python that measure it again."""
    lines = ["found = {}"]
    if measure == "classification":
        lines.insert(0, "from llmkern.evaluation.report.quality import class_batches, labels_of")
        lines.append("batches = class_batches(tokenizer, data.column('text'), labels_of(published, data))")
    if measure == "embeddings":
        return "\n".join([
            "from llmkern.evaluation.report.quality import embeddings, neighbours_kept",
            "texts = data.column('text')",
            f"rows = {{n: embeddings(m, tokenizer, texts, precision={precision!r}) for n, m in models.items()}}",
            "found = {name: (own * rows['published']).sum(-1) for name, own in rows.items()}",
            "kept = {name: neighbours_kept(own, rows['published']) for name, own in rows.items()}",
            "print({name: (float(one.mean()), float(one.min()), kept[name]) for name, one in found.items()})",
        ])  # fmt: skip
    call = _CALLS[measure].format(options="".join(f", {k}={v!r}" for k, v in options.items()))
    lines += [
        "for name, model in models.items():",
        f"    found[name] = ModelEvaluator(model, tokenizer, precision={precision!r}).{call}",
        "    print(name, found[name])",
    ]
    return "\n".join(lines)


def options_of(
    measure: str, model: Any, tokenizer: Any, window: int | None, stride: int | None, new: int
) -> dict[str, Any]:
    """The options of the evaluator's call, which the report tells. Raises ValueError for a stride over the window."""
    if measure == "generation":
        return {"max_new_tokens": new}
    if measure != "perplexity":
        return {}
    limit = scoring.limit_of(model, tokenizer)
    window = window or min(512, limit or 512)
    if stride is not None and stride > window:
        raise ValueError(f"stride: expected at most window = {window}, got {stride}")
    return {"window": window, "stride": stride or max(1, window // 2)}
