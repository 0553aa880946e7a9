"""The models on the kernels keep the contract against the same ones in plain PyTorch: loss, gradients, logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmkern.training import PretrainingConfig, build_model
from llmkern.verify import verify
from tests.training import tiny

OBJECTIVES = ["mlm", "mlm_nsp", "clm", "seq2seq"]


class Called(nn.Module):
    """A model called by position, as verify calls it; all its outputs are one tensor."""

    def __init__(self, config: PretrainingConfig, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = build_model(config).eval(), names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        output = self.model(**dict(zip(self.names, args, strict=True)))
        return output.loss if output.loss is not None else output.logits


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_keep_the_contract(objective, changes):
    batch = tiny.batch(objective)
    config = tiny.config(objective=objective, **changes)
    names = list(batch)
    fused, plain = (Called(tiny.config(**(config.to_dict() | {"fused": f})), names) for f in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):  # norms begin with ones
            p.add_(0.05 * torch.randn_like(p))
            q.copy_(p)
    verify(fused, plain, tuple(batch.values())).raise_if_failed()


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_logits_come_without_labels_and_are_those_of_the_plain_model(objective):
    batch = {k: v for k, v in tiny.batch(objective).items() if k != "labels"}
    fused, plain = (build_model(tiny.config(objective=objective, fused=f)).eval()(**batch) for f in (True, False))
    seen = (batch["attention_mask"] if objective == "mlm" else batch["document_ids"] + 1) > 0
    assert fused.loss is None and fused.logits.shape == (4, tiny.LENGTH, tiny.VOCABULARY)
    assert (fused.logits - plain.logits)[seen].abs().max() < 1e-5


def test_documents_do_not_see_each_other():
    """A packed row gives each document the loss that it has alone."""
    model = build_model(tiny.config(objective="clm"))
    tokens = torch.randint(tiny.VOCABULARY, (1, tiny.LENGTH))
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 2 + [-1]])
    packed = model(tokens, labels=tokens, document_ids=documents)
    alone = [model(t, labels=t).loss * (t.size(1) - 1) for t in tokens[:, :11].split([5, 4, 2], 1)]
    assert model.counted({"labels": tokens, "document_ids": documents})["clm"] == 4 + 3 + 1
    assert packed.loss.item() == pytest.approx(torch.stack(alone).sum().item() / 8, rel=1e-6)


def test_padding_has_no_part():
    """Neither where it stands nor what it holds changes a bit of the loss."""
    model = build_model(tiny.config(objective="mlm"))
    batch = tiny.batch("mlm")
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"]))
    longer = {k: torch.nn.functional.pad(v, (0, 3), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    assert model(**batch).loss == model(**other).loss == model(**longer).loss


def pair(objective):
    """The model on the kernels and in plain PyTorch, away from where all biases are 0."""
    models = [build_model(tiny.config(objective=objective, fused=fused)).eval() for fused in (True, False)]
    for model in models:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return models


@pytest.mark.parametrize("objective", ["mlm_nsp", "clm", "seq2seq"])
def test_a_row_of_padding_alone_is_the_same_on_the_kernels_and_in_plain(objective):
    batch = tiny.batch(objective)
    mask = "document_ids" if objective == "clm" else "attention_mask"
    for rows in (slice(1, 2), slice(3, 4)):  # in the middle, and the last
        batch[mask][rows] = -1 if objective == "clm" else 0
        if objective == "mlm_nsp":
            batch["next_sentence_label"][:] = 1
        fused, plain = (model(**batch).losses for model in pair(objective))
        assert fused.keys() == plain.keys()
        assert all(fused[k].item() == pytest.approx(plain[k].item(), rel=1e-5) for k in fused)
    batch[mask][:] = -1 if objective == "clm" else 0
    for model in pair(objective):
        with pytest.raises(ValueError, match="attention_mask: expected a batch with at least one token, got padding"):
            model(**batch)


def test_a_document_number_that_comes_back_is_another_document():
    tokens = torch.randint(tiny.VOCABULARY, (2, 8))
    again, other = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0]] * 2), torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2)
    hole, apart = torch.tensor([[0, 0, 0, -1, 0, 0, 1, 1]] * 2), torch.tensor([[0, 0, 0, -1, 3, 3, 1, 1]] * 2)
    for one, two in ((again, other), (hole, apart)):
        losses = [m(tokens, labels=tokens, document_ids=d).loss.item() for m in pair("clm") for d in (one, two)]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


SHAPES = {
    "labels": ("mlm", {"labels": (4, 14)}, r"labels: expected \(B, S\) = \(4, 12\), got shape \(4, 14\)"),
    "more rows": ("mlm", {"labels": (5, 12)}, r"labels: expected \(B, S\) = \(4, 12\), got shape \(5, 12\)"),
    "narrow labels": ("clm", {"labels": (4, 6)}, r"labels: expected \(B, S\) = \(4, 12\), got shape \(4, 6\)"),
    "types": ("mlm", {"token_type_ids": (4, 13)}, r"token_type_ids: expected \(B, S\) = \(4, 12\), got"),
    "places": ("clm", {"position_ids": (4, 13)}, r"position_ids: expected \(B, S\) = \(4, 12\), got"),
    "sentences": ("mlm_nsp", {"next_sentence_label": (3,)}, r"next_sentence_label: expected \(B,\) = \(4,\), got"),
    "outputs": ("seq2seq", {"labels": (3, 12)}, r"decoder_input_ids: expected the 4 rows of input_ids, got shape"),
    "decoder": ("seq2seq", {"decoder_input_ids": (4, 9)}, r"labels: expected \(B, T\) = \(4, 9\), got shape \(4, 12\)"),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("objective", "shapes", "words"), SHAPES.values(), ids=SHAPES)
def test_tensors_of_another_shape_are_refused_by_name(objective, shapes, words, fused):
    batch = tiny.batch(objective) | {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=words):
        build_model(tiny.config(objective=objective, fused=fused))(**batch)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("fused", [True, False])
def test_positions_of_one_row_are_those_of_all(objective, fused):
    model, batch = build_model(tiny.config(objective=objective, fused=fused)).eval(), tiny.batch(objective)
    places = torch.arange(tiny.LENGTH).flip(0)[None]
    assert model(**batch, position_ids=places).loss == model(**batch, position_ids=places.expand(4, -1)).loss


def test_rows_without_a_token_and_batches_without_a_label_do_no_harm():
    model = build_model(tiny.config(objective="seq2seq"))
    batch = tiny.batch("seq2seq")
    batch["attention_mask"][1] = 0
    assert model(**batch).loss.isfinite()
    batch["labels"][:] = -100
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_activation_checkpointing_changes_no_bit(objective):
    batch, found = tiny.batch(objective), []
    for again in (False, True):
        model = build_model(tiny.config(objective=objective, dropout=0.1, activation_checkpointing=again))
        torch.manual_seed(3)
        model(**batch).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({"input_ids": torch.zeros(2, 3)}, TypeError, "input_ids: expected dtype int64, got float32"),
        ({"input_ids": torch.zeros(6, dtype=torch.int64)}, ValueError, r"input_ids: expected \(B, S\), got shape"),
        ({"input_ids": torch.zeros(1, 17, dtype=torch.int64)}, ValueError, "at most max_position_embeddings = 16"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 4)},
            ValueError,
            r"attention_mask: expected \(B, S\) = \(1, 3\), got shape \(1, 4\)",
        ),
    ],
)
def test_bad_batches_are_refused_by_name(batch, error, words):
    with pytest.raises(error, match=words):
        build_model(tiny.config())(**batch)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_beyond_max_seq_length_are_refused_in_training_alone(objective, fused):
    model, most = build_model(tiny.config(objective=objective, fused=fused)), tiny.LENGTH
    rows = torch.ones(2, most + 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"input_ids: expected at most max_seq_length = {most} .*, got {most + 2}"):
        model(input_ids=rows, labels=rows)
    model(input_ids=rows, attention_mask=(torch.arange(most + 2) < most).long().expand(2, -1), labels=rows[:, :most]
          if objective == "seq2seq" else rows)  # fmt: skip
    assert model.eval()(input_ids=rows, labels=rows).loss.isfinite()
