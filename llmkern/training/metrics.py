"""What a run reports: a line of JSON for every step, a progress bar, TensorBoard where it is asked for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from llmkern.training.checkpoints import flush

FILE = "metrics.jsonl"


def read(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The steps of the run in a folder, each its step, loss, learning_rate, gradient_norm, tokens_per_second, seconds
    (since the step before it ended) and skipped_steps; floats have all their bits, None stands for what is not finite.
    A line that was cut off is left out."""
    path = Path(folder) / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Metrics:
    """Writes them, from one process.

    folder: None writes no file. start: the steps that a checkpoint holds; what a stopped run wrote beyond them is taken
    out, since these steps are done again. total: of the bar.
    """

    def __init__(self, folder: str | None, start: int, total: int | None, progress: bool, tensorboard: bool) -> None:
        self.file = self.board = None
        if folder is not None:
            path = Path(folder) / FILE
            kept = [json.dumps(row) + "\n" for row in read(folder) if row["step"] <= start]
            whole = path.with_suffix(".partial")
            whole.write_text("".join(kept))
            flush(whole)
            os.replace(whole, path)
            self.file = path.open("a", buffering=1)
        if tensorboard:
            if folder is None:
                raise ValueError("tensorboard: expected False without an output_dir, got True")
            self.board = _board(folder, start)
        from tqdm import tqdm

        self.bar = tqdm(total=total, initial=start, desc="pretraining", unit="step", disable=not progress)

    def write(self, row: dict[str, Any]) -> None:
        """One step's."""
        if self.file is not None:
            # JSON has no NaN: the norm of a step that float16 skipped.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.file.write(json.dumps(finite) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s", refresh=False)
        self.bar.update()

    def flush(self) -> None:
        """To the disk, before a checkpoint says that these steps are done."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.bar.close()
        for one in (self.file, self.board):
            if one is not None:
                one.close()


def _board(folder: str, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: expected the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=start + 1)
