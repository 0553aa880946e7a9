"""The scripts of docs/data.md and docs/training.md run under torchrun as printed, small, and go on when begun again."""

from __future__ import annotations

import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from llmkern.training.metrics import read
from llmkern.training.objectives import Corpus
from tests.training.pages import block, torchrun
from tests.training.small_tokenizers import word_piece

SMALL: dict[str, Any] = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
    max_seq_length=32, batch_size=4, max_steps=4, checkpoint_every=2, progress=False,
)  # fmt: skip


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def data_page(folder: Path) -> str:
    tokenizer = 'from transformers import AutoTokenizer\ntokenizer = AutoTokenizer.from_pretrained("tokenizer")\n'
    script = block("docs/data.md", "python", "Corpus.build")
    return tokenizer + replaced(script, 'output_dir="runs/mlm"', f'output_dir="runs", **{SMALL}')


def training_page(folder: Path) -> str:
    import yaml

    fields = yaml.safe_load(block("docs/training.md", "yaml", "output_dir"))
    (folder / "run.yaml").write_text(yaml.safe_dump(fields | SMALL | {"output_dir": "runs", "precision": "float32"}))
    return replaced(block("docs/training.md", "python", "# run.py"), '"gpt2"', '"tokenizer"')


@pytest.mark.parametrize("page", [data_page, training_page])
def test_two_processes_build_one_corpus_and_go_on_when_begun_again(tmp_path, page):
    word_piece().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    for name in sorted(topics)[:30]:
        (tmp_path / "texts" / f"{name}.txt").write_text(topics[name])
    script = page(tmp_path)
    torchrun(script, tmp_path)
    losses = [(r["step"], r["loss"]) for r in read(tmp_path / "runs")]
    assert [step for step, _ in losses] == [1, 2, 3, 4] and (tmp_path / "runs/step-4/rank-1.pt").exists()
    assert len(Corpus.load(tmp_path / "corpus")) and [p.name for p in tmp_path.glob("corpus*")] == ["corpus"]

    shutil.rmtree(tmp_path / "texts")  # not drawn again
    (tmp_path / "texts").mkdir()
    shutil.rmtree(tmp_path / "runs/step-4")
    torchrun(script, tmp_path)
    assert [(r["step"], r["loss"]) for r in read(tmp_path / "runs")] == losses
