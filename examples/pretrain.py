"""Pretrains a small decoder and a small encoder on real text, on llmkern and in plain PyTorch, and distils the decoder.

python -m examples.pretrain --plot pretrain.png
python -m examples.pretrain --text FOLDER_OR_FILES --steps 600

The text (by default Python's language reference, which comes with Python; else .txt files, one document each, or
.jsonl) is cleaned, a tokenizer is trained on it, and every tenth document is held out. Needs the extra "training":
pip install -e ".[training]". Sources of the objectives: Radford et al. 2018, "Improving Language Understanding by
Generative Pre-Training"; Devlin et al. 2018, "BERT"; of distillation: Hinton et al. 2015.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from examples.common import positive
from llmkern.evaluation import running
from llmkern.loss import LinearDistillationLoss
from llmkern.training import PretrainingConfig, Trainer, build_model
from llmkern.training.data import Cleaner, read_documents
from llmkern.training.objectives import (
    Batches,
    CausalLanguageModelingCollator,
    Corpus,
    MaskedLanguageModelingCollator,
    PackedDocuments,
    SentencePairs,
)

SPECIAL = {
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "eos_token": "[END]",
}
HELD_OUT = 20  # batches of held-out text at most
IN_TURN = 5  # steps of one model before the other's turn


@dataclass
class Run:
    """What came of training one kind of model on llmkern and in plain PyTorch, step by step on the same batches."""

    fused: list[float]  #: losses
    plain: list[float]
    seconds: list[tuple[float, float]]  #: per step, of either, in each round
    perplexity: tuple[float, float]  #: on held-out text, before and after

    def difference(self) -> float:
        return max(abs(a - b) / b for a, b in zip(self.fused, self.plain, strict=True))


@dataclass
class Results:
    decoder: Run
    encoder: Run
    teacher: float  #: perplexities on held-out text
    student: float
    alone: float


@dataclass
class Text:
    """Documents to train on and those held out, as tokens, and how."""

    tokenizer: Any
    training: Corpus
    held_out: Corpus


@dataclass
class Objective:
    """Examples for training, batches of held-out text, and what makes batches."""

    data: Any
    held_out: list[Any]
    collate: Callable[..., Any]
    term: str


class Distilled(nn.Module):
    """A student that learns from the labels and from a teacher, over hidden states: no logits are held.

    The teacher is no part of this module: it is not trained.
    """

    def __init__(self, student: Any, teacher: Any, loss: nn.Module) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self._teacher = (teacher.eval(),)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        (teacher,) = self._teacher
        targets = self.student.targets({"labels": labels, **inputs})
        rows, wanted = self.student.predicting(*self.student.hidden(**inputs), targets)
        with torch.no_grad():
            other, _ = teacher.predicting(*teacher.hidden(**inputs), targets)
        (weight, bias), (other_weight, other_bias) = self.student.output(), teacher.output()
        return self.loss(rows, weight, other, other_weight, wanted, bias, other_bias)


def documents_of(paths: Sequence[Path]) -> Iterator[str]:
    if paths:
        return read_documents(paths)
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def make_tokenizer(documents: Sequence[str], size: int) -> Any:
    """Byte-level BPE of that many tokens, with BERT's special tokens around a text or a pair."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents, trainer)
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def prepare(paths: Sequence[Path], vocabulary: int) -> Text:
    cleaner = Cleaner()
    documents = list(cleaner(documents_of(paths)))
    print(f"Cleaning\n{cleaner.report}\n")
    if len(documents) < 20:
        raise SystemExit(f"--text: expected 20 documents or more after cleaning, got {len(documents)}")
    training = [text for n, text in enumerate(documents) if n % 10]
    tokenizer = make_tokenizer(training, vocabulary)
    corpora = [Corpus.build(texts, tokenizer, words=True, language="en") for texts in (training, documents[::10])]
    print(f"{len(corpora[0].tokens)} tokens of {len(tokenizer)} to train on, {len(corpora[1].tokens)} held out\n")
    return Text(tokenizer, *corpora)


def objective_of(text: Text, config: PretrainingConfig) -> Objective:
    """Documents packed into rows for the decoder; pairs of segments with whole words hidden for the encoder."""
    length = config.max_seq_length
    data: list[Any]
    collate: Callable[..., Any]
    if config.objective == "clm":
        data = [PackedDocuments(corpus, text.tokenizer, length) for corpus in (text.training, text.held_out)]
        collate, term = CausalLanguageModelingCollator(text.tokenizer, length=length), "clm"
    else:
        data = [SentencePairs(corpus, text.tokenizer, length) for corpus in (text.training, text.held_out)]
        collate, term = MaskedLanguageModelingCollator(text.tokenizer, whole_word=True), "mlm"
    held_out = Batches(data[1], collate, config.batch_size, epochs=1, drop_last=False)
    return Objective(data[0], list(islice(held_out, HELD_OUT)), collate, term)


def perplexity(model: Any, objective: Objective) -> float:
    """exp of the mean loss of all tokens to be predicted in the held-out text: the next ones, or the hidden ones."""
    device = running.device_of(model)  # where Trainer has put it
    total = count = 0.0
    with running.evaluating(model):
        for held_out in objective.held_out:
            batch = running.tensors(held_out, device)
            counted = float(model.counted(batch)[objective.term])
            total += float(model(**batch).losses[objective.term]) * counted
            count += counted
    return math.exp(total / count)


def config_for(config: PretrainingConfig, examples: int, steps: int) -> PretrainingConfig:
    """With as many steps, whatever epochs that makes."""
    epochs = math.ceil((steps + 1) * config.batch_size / examples)
    return replace(config, max_steps=steps, num_epochs=epochs, warmup_steps=max(steps // 10, 1))


def train_both(text: Text, config: PretrainingConfig, steps: int) -> tuple[Run, Any, Objective]:
    """On llmkern and in plain PyTorch from the same parameters, a few steps in turn on the same batches."""
    objective = objective_of(text, config)
    config = config_for(config, len(objective.data), steps)
    trainers = [
        Trainer(build_model(c), c, objective.data, objective.collate) for c in (config, replace(config, fused=False))
    ]
    before = perplexity(trainers[0].inner, objective)
    losses: list[list[float]] = [[], []]
    seconds = []
    for start in range(0, steps, IN_TURN):
        taken = [0.0, 0.0]
        count = min(IN_TURN, steps - start)
        for which in (0, 1) if start // IN_TURN % 2 else (1, 0):
            began = time.perf_counter()
            losses[which] += trainers[which].train(count)
            taken[which] = (time.perf_counter() - began) / count
        seconds.append((taken[0], taken[1]))
    run = Run(*losses, seconds, (before, perplexity(trainers[0].inner, objective)))
    return run, trainers[0].inner, objective


def train_student(
    config: PretrainingConfig, steps: int, objective: Objective, teacher: Any | None, loss: nn.Module
) -> float:
    """A student of the teacher, or with None of the labels alone; its perplexity."""
    config = config_for(config, len(objective.data), steps)
    student = build_model(config)
    model = student if teacher is None else Distilled(student, teacher, loss)
    Trainer(model, config, objective.data, objective.collate).train()
    return perplexity(student, objective)


def show(name: str, run: Run) -> None:
    ratios = [plain / fused for fused, plain in run.seconds]
    tenth = max(len(run.fused) // 10, 1)
    first, last = (sum(part) / tenth for part in (run.fused[:tenth], run.fused[-tenth:]))
    spread = f" ({quantiles(ratios, n=5)[0]:.2f} to {quantiles(ratios, n=5)[-1]:.2f})" if len(ratios) > 1 else ""
    print(
        f"{name}\n"
        f"loss {first:.3f} in the first tenth of the steps, {last:.3f} in the last\n"
        f"perplexity on held-out text {run.perplexity[0]:.1f} before, {run.perplexity[1]:.1f} after\n"
        f"largest difference from plain PyTorch's loss in {len(run.fused)} steps: {run.difference():.1e} of it\n"
        f"{1e3 * median(f for f, _ in run.seconds):.1f} ms a step on llmkern, "
        f"{1e3 * median(p for _, p in run.seconds):.1f} ms in plain PyTorch: {median(ratios):.2f}{spread} times\n"
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files or folders with .txt or .jsonl")
    parser.add_argument("--steps", type=positive, help="of each training (default 200; with --quick 20)")
    parser.add_argument("--quick", action="store_true", help="small models and few steps: to see that it runs")
    parser.add_argument("--plot", type=Path, help="a file for a plot of the losses (needs matplotlib)")
    options = parser.parse_args(arguments)
    steps = options.steps or (20 if options.quick else 200)
    width, layers, length, vocabulary = (32, 2, 64, 600) if options.quick else (128, 3, 128, 2000)
    try:
        text = prepare(options.text, vocabulary)
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"argument --text: {error}")
    # Without dropout both draw nothing, and their losses can be compared.
    config = PretrainingConfig(
        objective="clm", vocab_size=len(text.tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=4 * width, max_position_embeddings=length, max_seq_length=length,
        batch_size=16, learning_rate=3e-3, dropout=0.0, layer_norm_eps=1e-6, progress=False,
        pad_token_id=text.tokenizer.pad_token_id,
    )  # fmt: skip
    decoder, teacher, objective = train_both(text, config, steps)
    show("Decoder: the next token, of documents packed into rows", decoder)
    encoder, _, _ = train_both(text, replace(config, objective="mlm_nsp", learning_rate=1e-3), steps)
    show("Encoder: hidden words, and whether a segment follows the other", encoder)

    small = replace(config, hidden_size=width // 2, intermediate_size=2 * width, num_hidden_layers=layers // 2)
    # Few steps on little text: what the teacher thinks of all tokens tells more than the one that came.
    loss = LinearDistillationLoss(temperature=1.0, alpha=0.9)
    student, alone = (train_student(small, steps, objective, t, loss) for t in (teacher, None))
    results = Results(decoder, encoder, decoder.perplexity[1], student, alone)
    print(
        "Distilled into half the width and half the layers\n"
        f"perplexity on held-out text: teacher {results.teacher:.1f}, student {student:.1f}, the same student "
        f"without a teacher {alone:.1f}"
    )
    if options.plot is not None:
        plot(results, options.plot)
    return results


def plot(results: Results, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 3.5))
    for axes, name, run in zip(both, ("decoder", "encoder"), (results.decoder, results.encoder), strict=True):
        axes.plot(run.plain, label="plain PyTorch", linewidth=3, alpha=0.4)
        axes.plot(run.fused, label="llmkern", linewidth=1)
        axes.set(xlabel="step", ylabel="loss", title=f"Pretraining a small {name}")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
