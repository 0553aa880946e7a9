"""Generated texts and classes are scored as sacrebleu, rouge-score and scikit-learn do, and as by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu
import torch
from sklearn.metrics import f1_score

from llmkern.evaluation import ModelEvaluator
from llmkern.evaluation.generation import scored
from tests.evaluation import tiny

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "t5": tiny.t5}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_batches_generate_what_single_prompts_do(name):
    model = MODELS[name]().double()
    right = []
    for text in tiny.TEXTS:
        ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0]
        new = made if name == "t5" else made[ids.size(1) :]
        right.append(tiny.tokenizer().decode(new, skip_special_tokens=True))
    found = ModelEvaluator(model, tiny.tokenizer()).generate(tiny.TEXTS, batch_size=4, max_new_tokens=6)
    assert found == right and len(set(right)) > 1


def test_scores_are_those_of_what_was_generated():
    evaluator = ModelEvaluator(tiny.llama(), tiny.tokenizer())
    outputs = evaluator.generate(tiny.TEXTS, max_new_tokens=8)
    references = [[outputs[0]], [outputs[1] + " the mat"], *(["the cat sat on a mat"] for _ in outputs[2:])]
    found = evaluator.evaluate_generation_quality(tiny.TEXTS, references, max_new_tokens=8)
    assert found.outputs == outputs
    right = sacrebleu.corpus_bleu(outputs, [[r[0] for r in references]])
    assert found.bleu == right.score and 0.0 < found.bleu < 100.0
    sentences = [sacrebleu.sentence_bleu(o, r).score for o, r in zip(outputs, references, strict=True)]
    assert found.mean_sentence_bleu == pytest.approx(sum(sentences) / len(sentences))
    assert "smooth:exp" in found.signature and "version:" in found.signature


def test_scores_by_hand():
    # Of 6 words 5 are in the reference; 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; as long as the reference.
    found = scored(["the cat sat on a mat"], [["the cat sat on the mat"]])
    right = 100.0 * math.exp((math.log(5 / 6) + math.log(3 / 5) + math.log(2 / 4) + math.log(1 / 3)) / 4)
    assert found.bleu == pytest.approx(right, rel=1e-6)
    assert found.rouge1 == pytest.approx(5 / 6) and found.rouge2 == pytest.approx(3 / 5)
    assert found.rougeL == pytest.approx(5 / 6)


def test_of_several_references_the_nearest_counts_whatever_their_number():
    found = scored(["a dog ran", "the cat sat on it"], [["a dog ran"], ["no", "the cat sat on it"]])
    assert found.bleu == pytest.approx(100.0) and found.rouge1 == found.rougeL == 1.0
    assert scored(["a dog ran", "the cat sat on it"], [["a dog ran"], ["no"]]).rouge1 == 0.5


def test_classes_of_texts():
    model = tiny.bert("BertForSequenceClassification", num_labels=3).double()
    batch = tiny.tokenizer()(tiny.TEXTS, padding=True, return_tensors="pt")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        said = model(**given).logits.argmax(-1).tolist()
    truth = [said[0], (said[1] + 1) % 3, *said[2:]]
    halves = [
        {**{n: v[at] for n, v in given.items()}, "labels": torch.tensor(truth[at])} for at in (slice(4), slice(4, 6))
    ]
    found = ModelEvaluator(model).evaluate_classification(halves)
    assert found.count == 6 and found.accuracy == pytest.approx(5 / 6) == found.f1_micro
    by_class = {}
    for c in set(truth) | set(said):
        both = sum(t == s == c for t, s in zip(truth, said, strict=True))
        by_class[c] = 2 * both / (truth.count(c) + said.count(c))
    assert found.f1_macro == pytest.approx(sum(by_class.values()) / len(by_class))
    assert found.f1_weighted == pytest.approx(sum(f * truth.count(c) / 6 for c, f in by_class.items()))
    assert found.f1_macro == f1_score(truth, said, average="macro")


def test_classes_of_tokens_leave_out_what_does_not_count():
    model = tiny.bert("BertForTokenClassification", num_labels=2)
    ids = torch.tensor([tiny.tokenizer()("the cat sat on the mat")["input_ids"]])
    with torch.no_grad():
        labels = model(ids).logits.argmax(-1)
    labels[0, 0], labels[0, 1] = -100, 1 - labels[0, 1]
    found = ModelEvaluator(model).evaluate_classification([{"input_ids": ids, "labels": labels}])
    assert found.count == 6 and found.accuracy == pytest.approx(5 / 6)


def of_llama() -> ModelEvaluator:
    return ModelEvaluator(tiny.llama(), tiny.tokenizer())


WRONG = {
    "no prompts": (lambda: of_llama().generate([]), ValueError, "prompts: expected at least one text, got none"),
    "one prompt": (lambda: of_llama().generate("a"), TypeError, "prompts: expected a list of texts, got str"),
    "a number": (lambda: of_llama().generate(["a", 3]), TypeError, r"prompts\[1\]: expected a string, got 3"),
    "few references": (
        lambda: of_llama().evaluate_generation_quality(["a", "the"], ["a"]),
        ValueError, "references: expected as many as prompts, 2, got 1",
    ),
    "one reference": (
        lambda: of_llama().evaluate_generation_quality(["a"], "a"), TypeError, "references: expected a list",
    ),
    "an empty one": (
        lambda: of_llama().evaluate_generation_quality(["a"], [[]]), ValueError, r"references\[0\]: expected a text",
    ),
    "no tokenizer": (lambda: ModelEvaluator(tiny.llama()).generate(["a"]), TypeError, "tokenizer: expected one"),
    "no new tokens": (
        lambda: of_llama().evaluate_generation_quality(["a"], ["a"], max_new_tokens=0), ValueError, "max_new_tokens",
    ),
    "no generate": (
        lambda: ModelEvaluator(torch.nn.Linear(2, 2), tiny.tokenizer()).generate(["a"]),
        TypeError, "model: expected one that has generate, got Linear",
    ),
    "no labels": (
        lambda: of_llama().evaluate_classification([{"input_ids": torch.ones(1, 2).long()}]),
        ValueError, "dataset: expected batches with labels",
    ),
    "labels of another shape": (
        lambda: of_llama().evaluate_classification(
            [{"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1).long()}]
        ),
        ValueError, "labels: expected",
    ),
    "nothing counts": (lambda: of_llama().evaluate_classification([]), ValueError, "at least one label that counts"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_beams_of_a_model_are_not_taken_unless_they_are_given():
    model = tiny.gpt2()
    greedy = ModelEvaluator(model, tiny.tokenizer(), progress=False).generate(tiny.TEXTS, max_new_tokens=12)
    model.generation_config.num_beams = 4
    evaluator = ModelEvaluator(model, tiny.tokenizer(), progress=False)
    assert evaluator.generate(tiny.TEXTS, max_new_tokens=12) == greedy
    assert evaluator.generate(tiny.TEXTS, max_new_tokens=12, num_beams=4) != greedy
