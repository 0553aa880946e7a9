"""A process killed in the middle of a run under torchrun: its agent starts all again, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llmkern.training.metrics import read

ROOT = Path(__file__).resolve().parents[2]


def torchrun(folder: Path, at: int) -> str:
    """What torchrun and its two processes wrote."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "--monitor-interval=0.1", "-m", "tests.training.elastic", str(folder), str(at),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_whole_runs_losses_are_those_of_an_undisturbed_one(tmp_path):
    """Killed at step 8, it goes on from the checkpoint of step 6."""
    torchrun(tmp_path / "whole", -1)
    written = torchrun(tmp_path / "killed", 8)
    assert "Signal 9 (SIGKILL)" in written or "exitcode: -9" in written
    expected, found = ([(r["step"], r["loss"]) for r in read(tmp_path / n)] for n in ("whole", "killed"))
    assert found == expected and [step for step, _ in found] == list(range(1, 11))
