"""Perplexity is that of an independent computation, token by token in float64, whatever is padded, cut or shared."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn

import llmkern
from llmkern.evaluation import ModelEvaluator
from llmkern.evaluation.scoring import negative_log_likelihood
from llmkern.training import build_model
from tests.evaluation import tiny
from tests.training import tiny as training

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


def tokens() -> list[list[int]]:
    return [tiny.tokenizer()(text)["input_ids"] for text in tiny.TEXTS]


def padded(left: bool) -> list[dict[str, torch.Tensor]]:
    side = "left" if left else "right"
    texts = [tiny.TEXTS[:4], tiny.TEXTS[4:]]
    found = [tiny.tokenizer()(t, padding=True, padding_side=side, return_tensors="pt") for t in texts]
    return [{name: one[name] for name in ("input_ids", "attention_mask")} for one in found]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().double()


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (6, 3), (6, 6), (5, 1), (7, 4), (2, 1)])
def test_of_texts_in_windows(model, window, stride):
    total, count = tiny.independent(model, tokens(), window, stride)
    found = ModelEvaluator(model, tiny.tokenizer()).likelihood(tiny.TEXTS, window=window, stride=stride, batch_size=3)
    assert found.tokens == count
    assert found.negative_log_likelihood == pytest.approx(total, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-12)
    if stride < window:
        assert count == sum(len(t) - 1 for t in tokens())


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_of_padded_batches(model, left):
    total, count = tiny.independent(model, tokens(), 64, 32)
    found = ModelEvaluator(model).likelihood(padded(left))
    assert found.tokens == count and found.negative_log_likelihood == pytest.approx(total, rel=1e-12)


def test_texts_without_a_window_are_cut_to_what_the_model_takes():
    model = tiny.llama(max_position_embeddings=8).double()
    total, count = tiny.independent(model, tokens(), 8, 4)
    found = ModelEvaluator(model, tiny.tokenizer()).evaluate_perplexity(tiny.TEXTS)
    assert found == pytest.approx(math.exp(total / count), rel=1e-12)


def test_logits_of_a_large_vocabulary_are_summed_in_float64():
    logits = torch.randn(2, 3, 50_000, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[7, -100, 49_999], [-100, -100, 3]])
    right = -math.fsum(tiny.log_probability(logits[i, j], int(targets[i, j])) for i, j in ((0, 0), (0, 2), (1, 2)))
    found, count = negative_log_likelihood(logits, targets)
    assert count == 3 and found == pytest.approx(right, rel=1e-13)


@torch.no_grad()
def test_labels_say_what_counts():
    model, ids = tiny.llama().double(), torch.tensor(tokens()[:1])
    labels = ids.clone()
    labels[:, [0, 2, 4]] = -100
    counted = [p for p in range(1, ids.size(1)) if p not in (2, 4)]
    right = -sum(tiny.log_probability(model(ids).logits[0, p - 1], int(ids[0, p])) for p in counted)
    found = ModelEvaluator(model).likelihood([{"input_ids": ids, "labels": labels}])
    assert found.tokens == len(counted) and found.negative_log_likelihood == pytest.approx(right, rel=1e-12)
    # transformers' own loss is the mean of the same.
    assert float(model(ids, labels=labels).loss) == pytest.approx(math.log(found.perplexity), rel=1e-6)


@torch.no_grad()
def test_of_an_encoder_decoder():
    model = tiny.t5().double()
    batch = padded(left=False)[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    right = float(model(**batch, labels=labels).loss)
    found = ModelEvaluator(model).likelihood([{**batch, "labels": labels}])
    assert found.tokens == int((labels != -100).sum())
    assert math.log(found.perplexity) == pytest.approx(right, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*reference:UserWarning")
@torch.no_grad()
@pytest.mark.parametrize("objective", ["clm", "seq2seq"])
def test_of_models_of_the_trainer(objective):
    """Rows of two documents; their own loss is the mean of the same."""
    model = build_model(training.config(objective=objective)).eval()
    batches = [training.batch(objective, range(4)), training.batch(objective, range(4, 9))]
    losses = [(float(model(**b).loss), int((model.targets(b) != -100).sum())) for b in batches]
    found = ModelEvaluator(model).likelihood(batches)
    assert found.tokens == sum(n for _, n in losses)
    assert found.negative_log_likelihood == pytest.approx(sum(x * n for x, n in losses), rel=1e-5)


def test_of_kernelized_and_quantised_models_and_under_autocast():
    plain = tiny.llama()
    right = ModelEvaluator(plain, tiny.tokenizer()).evaluate_perplexity(tiny.TEXTS)
    total, count = tiny.independent(copy.deepcopy(plain).double(), tokens(), 64, 32)
    assert right == pytest.approx(math.exp(total / count), rel=1e-5)
    cast = ModelEvaluator(plain, tiny.tokenizer(), precision="bfloat16").evaluate_perplexity(tiny.TEXTS)
    assert cast != right and cast == pytest.approx(right, rel=0.1)
    llmkern.kernelize(plain)
    assert ModelEvaluator(plain, tiny.tokenizer()).evaluate_perplexity(tiny.TEXTS) == pytest.approx(right, rel=1e-5)
    llmkern.quantize_model(plain, skip=("lm_head",), measure=False)
    int8 = ModelEvaluator(plain, tiny.tokenizer()).evaluate_perplexity(tiny.TEXTS)
    assert int8 != right and int8 == pytest.approx(right, rel=0.1)


@torch.no_grad()
def test_pseudo_perplexity_hides_each_token_in_turn():
    model = tiny.bert().double()
    texts, total, count = tiny.TEXTS[:4], 0.0, 0
    for ids in tokens()[:4]:
        for place in range(1, len(ids)):  # behind <s>, which is a special token
            hidden = torch.tensor([ids])
            hidden[0, place] = 3
            total -= tiny.log_probability(model(hidden).logits[0, place], ids[place])
            count += 1
    found = ModelEvaluator(model, tiny.tokenizer()).evaluate_pseudo_perplexity(texts, batch_size=5)
    assert found == pytest.approx(math.exp(total / count), rel=1e-12)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(tiny.llama())
    evaluator = ModelEvaluator(model, tiny.tokenizer())
    found = evaluator.likelihood(tiny.TEXTS, window=6, stride=3, batch_size=3)
    outputs = evaluator.generate(tiny.TEXTS, batch_size=2, max_new_tokens=4)
    labels = [{**b, "labels": b["input_ids"]} for b in padded(left=False)]
    classes = evaluator.evaluate_classification(labels).accuracy
    sharded = fully_shard(tiny.llama())
    with pytest.raises(
        ValueError, match=r"model: expected one that is whole on every process, got a sharded one \(model"
    ):
        ModelEvaluator(sharded)
    Path(folder, f"{rank}.json").write_text(json.dumps([*found.__dict__.values(), outputs, classes]))
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path):
    spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    evaluator = ModelEvaluator(tiny.llama(), tiny.tokenizer())
    whole = evaluator.likelihood(tiny.TEXTS, window=6, stride=3, batch_size=3)
    assert first[1] == whole.tokens and first[0] == pytest.approx(whole.negative_log_likelihood, rel=1e-6)
    assert first[2] == evaluator.generate(tiny.TEXTS, batch_size=2, max_new_tokens=4)
    labels = [{**b, "labels": b["input_ids"]} for b in padded(left=False)]
    assert first[3] == evaluator.evaluate_classification(labels).accuracy


def test_the_model_is_left_as_it_was():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    ModelEvaluator(model).evaluate_perplexity(padded(left=False))
    assert [m.training for m in model.modules()] == before


WRONG = {
    "an encoder": (lambda: ModelEvaluator(tiny.bert()).likelihood(padded(False)), ValueError, "got an encoder"),
    "the trainer's encoder": (
        lambda: ModelEvaluator(build_model(training.config())).likelihood([training.batch()]),
        ValueError, "got an encoder",
    ),
    "one text": (lambda: of_llama().likelihood("the cat"), TypeError, "dataset: expected an iterable of batches or of"),
    "a number": (lambda: of_llama().likelihood(3), TypeError, "dataset: expected an iterable"),
    "nothing": (lambda: of_llama().likelihood([]), ValueError, "dataset: expected at least one token to predict"),
    "one token": (lambda: of_llama().likelihood([""]), ValueError, "dataset: expected at least one token to predict"),
    "a batch of a list": (lambda: of_llama().likelihood([[1, 2]]), TypeError, "dataset: expected batches that map"),
    "no tokens": (lambda: of_llama().likelihood([{"x": 1}]), ValueError, "expected batches with input_ids"),
    "texts, then none": (lambda: of_llama().likelihood(["a cat", 3]), TypeError, "dataset: expected a string"),
    "a stride over the window": (
        lambda: of_llama().likelihood(["a"], window=4, stride=5),
        ValueError, "stride: expected at most window = 4, got 5",
    ),
    "a window of 1": (lambda: of_llama().likelihood(["a"], window=1), ValueError, "window: expected at least 2, got 1"),
    "no batch": (lambda: of_llama().likelihood(["a"], batch_size=0), ValueError, "batch_size: expected a positive"),
    "no tokenizer": (lambda: ModelEvaluator(tiny.llama()).likelihood(["a"]), TypeError, "tokenizer: expected one"),
    "texts of pairs": (lambda: ModelEvaluator(tiny.t5()).likelihood(["a"]), ValueError, "input_ids and labels"),
    "no labels of pairs": (lambda: ModelEvaluator(tiny.t5()).likelihood(padded(False)), ValueError, "with labels"),
    "other labels": (
        lambda: of_llama().likelihood([{"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 3).long()}]),
        ValueError, "labels: expected",
    ),
    "no words": (lambda: of_llama().evaluate_pseudo_perplexity([]), ValueError, "texts: expected at least one"),
    "long words": (
        lambda: ModelEvaluator(tiny.bert(), tiny.tokenizer()).evaluate_pseudo_perplexity(["a " * 32]),
        ValueError, r"texts\[0\]: expected at most 32 tokens, got 33",
    ),
    "no model": (lambda: ModelEvaluator("a"), TypeError, "model: expected an nn.Module, got str"),
    "a precision": (lambda: ModelEvaluator(tiny.llama(), precision="int4"), ValueError, "precision: expected one of"),
    "no logits": (
        lambda: ModelEvaluator(Tells()).likelihood([{"input_ids": torch.ones(1, 2).long()}]),
        TypeError, "model: expected one whose output has logits, got str",
    ),
}  # fmt: skip


class Tells(torch.nn.Module):
    def forward(self, input_ids):
        return "words"


def of_llama() -> ModelEvaluator:
    return ModelEvaluator(tiny.llama(), tiny.tokenizer())


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
