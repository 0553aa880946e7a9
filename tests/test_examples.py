"""Every script under examples/ runs on small inputs and shows what it says."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llmkern
from examples import evaluate, export_aotinductor, int8_text, kernelize_model, lora_int8, pretrain, train_encoder
from llmkern.loss import LinearDistillationLoss
from llmkern.training import PretrainingConfig, build_model
from llmkern.training.base import ModelOutput
from tests.inductor import QUICK_PACKAGE
from tests.models import tiny

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {p.stem for p in (ROOT / "examples").glob("*.py")} - {"__init__", "common"}


def test_kernelize_model(capsys):
    kernelize_model.main([])
    printed = capsys.readouterr().out
    assert "modules that kernels might serve would be replaced" in printed and "PASSED" in printed
    assert "FusedEncoderLayer" in printed and "FusedDecoderLayer" in printed


def test_kernelize_a_hugging_face_model(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5")
    tiny.save(tmp_path)
    text = tmp_path / "text"
    text.write_text("the cat sat on the mat and the dog ran")
    kernelize_model.main(["--model", str(tmp_path), "--text", str(text)])
    printed = capsys.readouterr().out
    assert re.search(r"\b(\d+) of \1 modules that kernels might serve replaced", printed) and "PASSED" in printed


def test_int8_text(capsys):
    pytest.importorskip("transformers", minversion="5")
    int8_text.main(["--steps", "60", "--new", "20"])
    printed = capsys.readouterr().out
    assert "14 of 15 linear layers in int8" in printed
    losses = [float(x) for x in re.findall(r"loss (\d\.\d+):", printed)]
    assert len(losses) == 2 and abs(losses[1] - losses[0]) < 0.01 * losses[0]
    assert int(re.search(r"the same for the first (\d+) of 20 tokens", printed)[1]) > 0


def test_train_encoder(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    losses = train_encoder.main(["--steps", "25", "--plot", str(tmp_path / "new" / "loss.png")])
    assert len(losses) == 25 and sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "PositionalEncoding" in printed and "FusedEncoderLayer" in printed


def test_evaluate(capsys):
    pytest.importorskip("transformers", minversion="5")
    evaluate.main(["--steps", "40", "--windows", "2", "--rounds", "2", "--prompt-tokens", "16"])
    printed = capsys.readouterr().out
    found = {
        name: float(x) for name, x in re.findall(r"^(fp32|llmkern|int8) +perplexity (\d+\.\d+)", printed, re.MULTILINE)
    }
    assert len(found) == 3 and found["llmkern"] == pytest.approx(found["fp32"], rel=1e-3)
    assert found["int8"] == pytest.approx(found["fp32"], rel=0.1) and 1 < found["fp32"] < 200
    assert len(re.findall(r"^\w+ +decode: .* times as fast", printed, re.MULTILINE)) == 3
    assert "a million tokens" in printed and re.search(r"^attention +cpu", printed, re.MULTILINE)


def test_pretrain(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("matplotlib")
    found = pretrain.main(["--quick", "--plot", str(tmp_path / "new" / "loss.png")])
    for run in (found.decoder, found.encoder):
        assert len(run.fused) == len(run.plain) == 20 and run.difference() < 1e-4
        assert sum(run.fused[-4:]) < 0.99 * sum(run.fused[:4]) and run.perplexity[1] < 0.9 * run.perplexity[0]
    assert found.teacher < found.student < 0.98 * found.alone < 0.98 * found.decoder.perplexity[0]
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "dropped: too few words" in printed and "the same student without a teacher" in printed


class OnAnotherDevice(torch.nn.Module):
    """Knows whether what it is given lies where its parameters do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(3, device="meta"))

    def counted(self, batch):
        assert {t.device for t in batch.values()} == {self.weight.device}
        return {"clm": torch.tensor(4)}

    def forward(self, **batch):
        assert not self.training and self.counted(batch)
        return ModelOutput(None, {"clm": torch.tensor(2.0)}, None)


def test_held_out_batches_go_to_the_device_of_the_model():
    held_out = [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}] * 2
    objective = pretrain.Objective(None, held_out, lambda examples: {}, "clm")
    assert pretrain.perplexity(OnAnotherDevice(), objective) == pytest.approx(math.exp(2.0))


def test_the_student_learns_from_its_teacher():
    """The loss of hidden states is that of both models' logits, and the teacher gets no gradients."""
    config = PretrainingConfig(
        objective="clm", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, max_seq_length=12, dropout=0.0,
    )  # fmt: skip
    student, teacher = build_model(config), build_model(replace(config, hidden_size=32, seed=1))
    tokens = torch.randint(50, (3, 12))
    loss = pretrain.Distilled(student, teacher, LinearDistillationLoss(1.0, 0.9))(tokens, input_ids=tokens)
    loss.backward()
    student_logits, teacher_logits = (m(tokens).logits[:, :-1].flatten(0, 1) for m in (student, teacher))
    expected = llmkern.reference.DistillationLoss(1.0, 0.9)(student_logits, teacher_logits, tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    got = [p.grad for p in student.parameters()]
    for a, b in zip(got, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_lora_int8(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("peft")
    before, adapted, merged = lora_int8.main(
        ["--steps", "40", "--adapter-steps", "30", "--output", str(tmp_path / "adapters")]
    )
    assert adapted < 0.97 * before and abs(merged - adapted) < 0.1 * (before - adapted)
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


def test_export_aotinductor(tmp_path, capsys):
    with torch._inductor.config.patch(QUICK_PACKAGE):
        assert (
            export_aotinductor.main(["--int8", "--layers", "1", "--output", str(tmp_path / "new" / "model.pt2")]) < 1e-5
        )
    printed = capsys.readouterr().out
    assert "FusedEncoderLayer" in printed and "2 of 3 linear layers in int8" in printed


WRONG = {
    "a file that is not there": (train_encoder, ["--text", "nowhere"], "argument --text: expected a file of text, got"),
    "a window that predicts nothing": (evaluate, ["--window", "1"], "--window: expected at least 2 tokens"),
    "more tokens than there is room for": (
        evaluate,
        ["--steps", "1", "--windows", "1", "--rounds", "1", "--prompt-tokens", "100000"],
        "prompt_tokens: expected at most",
    ),
    "a free hour": (evaluate, ["--cost-per-hour", "0"], "--cost-per-hour: cost_per_hour: expected a number above 0"),
    "no steps": (int8_text, ["--steps", "0"], "argument --steps: expected a positive integer, got '0'"),
    "a model that is not there": (int8_text, ["--model", "/nowhere"], "--model: expected a folder or name of a"),
    "a text that is not there": (pretrain, ["--text", "nowhere"], "argument --text: paths: expected files or folders"),
    "too little text": (pretrain, ["--text", "README.md"], "argument --text: paths: expected files of .txt, .jsonl"),
    "another ending": (export_aotinductor, ["--output", "model.onnx"], "--output: expected a file that ends in .pt2"),
}


@pytest.mark.parametrize(("script", "arguments", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(script, arguments, words, capsys, monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert words in capsys.readouterr().err + str(stopped.value)


def test_each_is_tested_and_told_of():
    source, page = Path(__file__).read_text(), (ROOT / "docs/models.md").read_text()
    for name in SCRIPTS:
        assert f"{name}.main(" in source and f"examples/{name}.py" in page, name
        assert f"python -m examples.{name}" in importlib.import_module(f"examples.{name}").__doc__
