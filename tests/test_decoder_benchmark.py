"""The comparison of engines that continue text: its table, its errors, and one engine of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import decoder, decoder_contestants

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as benchmarks.decoder would save it, and ids of a text."""
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    torch.save(torch.randint(2, 90, (2 * decoder_contestants.WINDOW,)), made / decoder_contestants.TOKENS)
    return made


@pytest.mark.parametrize("name", ["transformers (sdpa, fp32)", "llmkern (fp32)", "llmkern (int8)"])
def test_an_engine(name, folder, capsys):
    decoder_contestants.main(name, folder, prompt=20, new=5, samples=2)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["prefill"]) == len(found["decode"]) == 2 and len(found["text"]) == 6
    assert found["loss"] == pytest.approx(math.log(90), rel=0.05)  # of weights that know nothing


def test_engines_agree(folder):
    ids = torch.load(folder / decoder_contestants.TOKENS)[:40].tolist()
    plain, ours = (decoder_contestants.CONTESTANTS[n][1](folder) for n in (decoder.BASELINE, "llmkern (fp32)"))
    assert plain.continued(ids, 12) == ours.continued(ids, 12)
    assert plain.loss(ids) == pytest.approx(ours.loss(ids), rel=1e-5)


def test_the_table():
    plain = {"prefill": [2.0, 1.0], "decode": [4.0, 5.0], "loss": math.log(20.0)}
    ours = {"prefill": [0.25], "decode": [1.0], "loss": None}
    text = decoder.table({decoder.BASELINE: [plain], "x": [ours]}, prompt=512, new=128)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[2] == [decoder.BASELINE, "512", "1.00", "32.0", "1.00", "1.00 to 1.00", "20.00"]
    assert rows[3] == ["x", "2048", "4.00", "128", "4.00", "4.00 to 4.00", "not given"]


def test_an_engine_that_fails_leaves_the_others(folder, monkeypatch):
    def failing(name, *args):
        if name == "b":
            raise subprocess.CalledProcessError(3, "x", stderr="RuntimeError: no such file\n")
        return {"prefill": [1.0], "decode": [1.0], "loss": 1.0}

    monkeypatch.setattr(decoder, "child", failing)
    monkeypatch.setattr(decoder, "missing", lambda name: "c is not installed" if name == "c" else None)
    found, failed = decoder.compare(["a", "b", "c"], folder, 8, 4, 1, 2)
    assert list(found) == ["a"] and len(found["a"]) == 2
    assert failed == {"c": "c is not installed", "b": "its process ended with 3: RuntimeError: no such file"}
    assert "- c: c is not installed" in decoder.notes(failed)[0] and decoder.notes({}) == []


def test_a_process_of_its_own(folder):
    found = decoder.child(decoder.BASELINE, folder, 20, 5, 1)
    assert len(found["decode"]) == 1 and found["loss"] > 0.0


def test_bad_input():
    command = [sys.executable, "-m", "benchmarks.decoder", "--new", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--new: expected at least 1, got 0" in done.stderr
