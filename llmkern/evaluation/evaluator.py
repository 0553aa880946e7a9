"""ModelEvaluator: perplexity, generated texts, classification, of any model and on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import check
from llmkern.evaluation import generation, running, scoring
from llmkern.evaluation.results import Classification, GenerationQuality, Likelihood
from llmkern.evaluation.running import T


class ModelEvaluator:
    """Evaluates a model: as published, kernelized or quantised.

    model: a module whose forward takes a batch by keywords and whose output has logits. tokenizer: a Hugging Face
    tokenizer, for what starts from texts. precision: "float32" runs the model as it is, "bfloat16" and "float16" run it
    under autocast. progress: a bar where stderr is a terminal.

    In several processes of torch.distributed, each with the whole model and the same dataset, each takes every n-th
    batch, and all get the result of all. The model is in eval mode meanwhile, and afterwards as it was.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, precision: str = "float32", progress: bool = True
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        check.one_of("precision", precision, running.PRECISIONS)
        check.flag("progress", progress)
        self.model, self.tokenizer = running.whole(model), tokenizer
        self.precision, self.progress = precision, progress

    def evaluate_perplexity(
        self, dataset: Iterable[Any], *, window: int | None = None, stride: int | None = None, batch_size: int = 8
    ) -> float:
        """The perplexity, `likelihood(...).perplexity`: exp of the mean negative log-likelihood of all tokens that were
        predicted. Arguments and errors are those of `likelihood`."""
        return self.likelihood(dataset, window=window, stride=stride, batch_size=batch_size).perplexity

    def likelihood(
        self, dataset: Iterable[Any], *, window: int | None = None, stride: int | None = None, batch_size: int = 8
    ) -> Likelihood:
        """The negative log-likelihood of every token that a decoder, or an encoder-decoder's decoder, predicts.

        dataset: batches or texts. A batch maps the model's arguments to tensors: input_ids (B, S) int64; with
        attention_mask (B, S) its padding, left or right, counts nowhere; labels (B, S), by default input_ids, are -100
        where a token does not count, and stand where their tokens do (a decoder's logits are compared with the next
        place's). An encoder-decoder needs labels (B, T). Batches are weighed by the tokens that count.

        Texts are encoded by the tokenizer, and read in windows of `window` tokens (by default the most that the model
        takes) that begin `stride` tokens apart (by default half a window), `batch_size` of them together. Each token
        counts once, with what its window holds before it as its context; the first of a text never counts, nor, at a
        stride of a whole window, the first of each window.

        Raises ValueError for an encoder, for a dataset in which nothing counts, and for a stride over the window;
        TypeError where there is no tokenizer for texts, and for other data. Source: "Perplexity of fixed-length
        models", Hugging Face.
        """
        kind = scoring.kind_of(self.model)
        batches = self._batches(dataset, kind, window, stride, batch_size)

        def predicted(batch: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
            given, targets = scoring.prepared(running.tensors(batch, device), kind)
            if not targets.numel():
                return None
            logits = running.logits_of(self.model(**given)) if kind == "decoder" else self._of_pairs(given)
            return logits, targets

        return self._likelihood("dataset", batches, "perplexity", predicted)

    def _likelihood(
        self, name: str, batches: Iterable[T], what: str,
        predicted: Callable[[T, torch.device], tuple[Tensor, Tensor] | None],
    ) -> Likelihood:  # fmt: skip
        """The sum over batches of all processes; predicted: a batch's logits and targets, None where it has none."""
        device, summed, count = running.device_of(self.model), 0.0, 0
        with running.evaluating(self.model, self.precision):
            for batch in running.share(batches, what, self.progress):
                if (found := predicted(batch, device)) is not None:
                    more, counted = scoring.negative_log_likelihood(*found)
                    summed, count = summed + more, count + counted
        summed, tokens = running.total([summed, float(count)], device)
        if not tokens:
            raise ValueError(f"{name}: expected at least one token to predict, got none")
        return Likelihood(summed, int(tokens))

    def _of_pairs(self, given: dict[str, Any]) -> Tensor:
        """An encoder-decoder's logits. Those of llmkern.training have none beside labels."""
        if not hasattr(self.model, "counted"):
            return running.logits_of(self.model(**given))
        config: Any = self.model.config
        rest = {name: value for name, value in given.items() if name != "labels"}
        return running.logits_of(
            self.model(**{"decoder_input_ids": scoring.moved(given["labels"], config.pad_token_id), **rest})
        )

    def _batches(
        self, dataset: Any, kind: str, window: int | None, stride: int | None, batch_size: int
    ) -> Iterable[Any]:
        """The dataset's batches, or those of its texts' windows."""
        check.positive("batch_size", batch_size)
        for name, value in (("window", window), ("stride", stride)):
            if value is not None:
                check.positive(name, value)
        if isinstance(dataset, (str, dict)) or not isinstance(dataset, Iterable):
            raise TypeError(f"dataset: expected an iterable of batches or of texts, got {type(dataset).__name__}")
        items = iter(dataset)
        first = next(items, None)
        if not isinstance(first, str):
            return chain([] if first is None else [first], items)
        if kind != "decoder":
            raise ValueError("dataset: expected batches with input_ids and labels for an encoder-decoder, got texts")
        window = window or scoring.limit_of(self.model, self.tokenizer)
        if window is not None and window < 2:
            raise ValueError(f"window: expected at least 2, got {window}")
        if stride is not None and (window is None or stride > window):
            raise ValueError(f"stride: expected at most window = {window}, got {stride}")
        self._needs_tokenizer()
        return self._windows(chain([first], items), window, stride, batch_size)

    def _windows(
        self, texts: Iterable[Any], window: int | None, stride: int | None, size: int
    ) -> Iterator[dict[str, Tensor]]:
        """Each batch's windows are of as many texts as it takes, read as it goes."""

        def every() -> Iterator[scoring.Window]:
            for text in texts:
                check.text("dataset", text)
                tokens = self.tokenizer(text, verbose=False)["input_ids"]  # long ones are what windows are for
                most = window or max(len(tokens), 2)
                yield from scoring.windows(tokens, most, stride or max(most // 2, 1))

        found = every()
        while part := list(islice(found, size)):
            yield scoring.batch_of(part)

    def evaluate_pseudo_perplexity(self, texts: Sequence[str], *, batch_size: int = 32) -> float:
        """An encoder's pseudo-perplexity: exp of the mean negative log-likelihood of each token of the texts, hidden
        alone behind the mask token while all others are seen. What the tokenizer adds, as [CLS], counts nowhere.

        texts: each at most as long as the model takes; a text of n tokens is n rows, `batch_size` of them together.
        Raises TypeError without a tokenizer, ValueError where it has no mask token, for a text that is too long, and
        where nothing counts. Source: Salazar et al. 2020, "Masked language model scoring".
        """
        check.positive("batch_size", batch_size)
        self._needs_tokenizer()
        hidden = self.tokenizer.mask_token_id
        if hidden is None:
            raise ValueError("tokenizer: expected one with a mask token, got one without")
        checked = _texts("texts", texts)
        limit = scoring.limit_of(self.model, self.tokenizer)

        def rows() -> Iterator[tuple[list[int], int]]:
            for number, text in enumerate(checked):
                made = self.tokenizer(text, return_special_tokens_mask=True)
                tokens, added = list(made["input_ids"]), made["special_tokens_mask"]
                if limit is not None and len(tokens) > limit:
                    raise ValueError(f"texts[{number}]: expected at most {limit} tokens, got {len(tokens)}")
                yield from ((tokens, place) for place, is_added in enumerate(added) if not is_added)

        def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            found, pad = rows(), generation.pad_token(self.tokenizer)
            while part := list(islice(found, batch_size)):
                batch = generation.padded([tokens for tokens, _ in part], pad, left=False)
                targets = torch.full_like(batch["input_ids"], scoring.IGNORED)
                for row, (tokens, place) in enumerate(part):
                    targets[row, place], batch["input_ids"][row, place] = tokens[place], hidden
                yield batch, targets

        def predicted(given: tuple[dict[str, Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
            batch, targets = given
            return running.logits_of(self.model(**running.tensors(batch, device))), targets.to(device)

        return self._likelihood("texts", batches(), "pseudo-perplexity", predicted).perplexity

    def evaluate_generation_quality(
        self,
        prompts: Sequence[str],
        references: Sequence[str | Sequence[str]],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 100,
        **options: Any,
    ) -> GenerationQuality:
        """BLEU and ROUGE of what the model generates for prompts.

        references: for each prompt a text, or several of which the nearest counts. max_new_tokens: of each. options:
        further ones of the model's `generate`; do_sample is False and num_beams is 1 unless given; whatever else its
        generation_config asks for, as penalties of repetition, stays. A decoder's prompt is no part of what
        is scored. Prompts are generated `batch_size` at a time, padded left (right for an encoder-decoder).

        Raises TypeError without a tokenizer or for a model without `generate`, ValueError for no prompts, one of no
        tokens, and other than one entry of references for each; ImportError without sacrebleu and rouge-score.
        """
        check.positive("batch_size", batch_size)
        check.positive("max_new_tokens", max_new_tokens)
        listed = _texts("prompts", prompts)
        checked = generation.checked_references(references, len(listed))
        outputs = self.generate(listed, batch_size=batch_size, max_new_tokens=max_new_tokens, **options)
        return generation.scored(outputs, checked)

    def generate(
        self, prompts: Sequence[str], *, batch_size: int = 8, max_new_tokens: int = 100, **options: Any
    ) -> list[str]:
        """The continuations of the prompts, in their order, as `evaluate_generation_quality` scores them."""
        self._needs_tokenizer()
        model: Any = self.model
        if not callable(getattr(model, "generate", None)):
            raise TypeError(f"model: expected one that has generate, got {type(model).__name__}")
        listed = _texts("prompts", prompts)
        pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
        rows, pad = generation.encoded(self.tokenizer, listed, "prompts"), generation.pad_token(self.tokenizer)
        options = {"do_sample": False, "num_beams": 1, "pad_token_id": pad, **options}
        device, found = running.device_of(model), []
        with running.evaluating(model, self.precision):
            for part in running.share(list(generation.batches(rows, batch_size)), "generation", self.progress):
                batch = running.tensors(generation.padded([rows[i] for i in part], pad, left=not pairs), device)
                ids = model.generate(**batch, max_new_tokens=max_new_tokens, **options)
                new = ids if pairs else ids[:, batch["input_ids"].size(1) :]
                texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                found += list(zip(part, texts, strict=True))
        return [text for _, text in sorted(running.gathered(found))]

    def evaluate_classification(self, dataset: Iterable[Any]) -> Classification:
        """Accuracy and F1 of the class with the highest logit.

        dataset: batches that map the model's arguments to tensors, labels among them: (B,) int64 for logits (B, C), or
        (B, S) for those of tokens, (B, S, C), where -100 does not count.

        Raises ValueError for a batch without labels or of other shapes, and where nothing counts.
        """
        from sklearn.metrics import accuracy_score, f1_score

        device = running.device_of(self.model)
        pairs: list[tuple[int, int]] = []
        with running.evaluating(self.model, self.precision):
            for batch in running.share(dataset, "classification", self.progress):
                given = running.tensors(batch, device)
                labels = given.pop("labels", None)
                if not isinstance(labels, Tensor):
                    raise ValueError("dataset: expected batches with labels, got one without")
                check.dtype("labels", labels, (torch.int64, torch.int32))
                logits = running.logits_of(self.model(**given))
                check.shape("labels", labels, "those of the logits without classes", tuple(logits.shape[:-1]))
                counts = labels != scoring.IGNORED
                pairs += zip(labels[counts].tolist(), logits.argmax(-1)[counts].tolist(), strict=True)
        pairs = running.gathered(pairs)
        if not pairs:
            raise ValueError("dataset: expected at least one label that counts, got none")
        truth, said = zip(*pairs, strict=True)
        f1 = {
            f"f1_{a}": float(f1_score(truth, said, average=a, zero_division=0.0))
            for a in ("macro", "micro", "weighted")
        }
        return Classification(float(accuracy_score(truth, said)), **f1, count=len(pairs))

    def _needs_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise TypeError("tokenizer: expected one for what starts from texts, got None")


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of texts, got {type(value).__name__}")
    listed = list(value)
    if not listed:
        raise ValueError(f"{name}: expected at least one text, got none")
    for number, one in enumerate(listed):
        check.text(f"{name}[{number}]", one)
    return listed
