"""Scripts of the pages, and torchrun around them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def block(page: str, language: str, holds: str) -> str:
    """The page's first block of code in that language that holds some text."""
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if holds in b)


def torchrun(script: str, folder: Path, processes: int = 2) -> str:
    """What the processes that run the script, in that folder, print."""
    (folder / "run.py").write_text(script)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--monitor-interval=0.1", "run.py",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
