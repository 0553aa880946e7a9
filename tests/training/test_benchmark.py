"""benchmarks.training runs and writes what it says."""

from __future__ import annotations

import json

from benchmarks import training


def test_the_benchmark_of_a_step_runs(tmp_path, capsys):
    assert training.main(["--quick", "--length", "32", "--padding", "0.3", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("training-*.json")
    found = json.loads(path.read_text())["found"]["contestants"]
    assert set(found) == {training.BASELINE, training.GATHERED, training.OURS}
    assert "| llmkern" in capsys.readouterr().out and path.with_suffix(".md").exists()


def test_the_three_have_the_same_loss():
    """So that nobody is timed at something else."""
    options = training.argparse.Namespace(batch=2, length=32, quick=True, precision="float32", dropout=0.0, padding=0.3)
    losses = [[step() for _ in range(3)] for step in training.contestants(options).values()]
    assert max(abs(a - b) / b for one in losses for a, b in zip(one, losses[0], strict=True)) < 1e-5
