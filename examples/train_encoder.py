"""Trains a small encoder on the kernels to find the bytes that were hidden from a text (masked language modelling).

python -m examples.train_encoder --steps 200 --plot loss.png

Source of the objective: Devlin et al. 2018, "BERT".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import llmkern
from examples.common import ROOT, as_bytes, batch_of, positive, text_file

HIDDEN = 256  # the token in the place of a byte that is hidden


class Encoder(nn.Module):
    """Plain torch and the reference's positions; logits (B, S, 256) of bytes (B, S)."""

    def __init__(self, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, width)
        self.positions = llmkern.reference.PositionalEncoding(width, 512)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.positions(self.embedding(tokens).transpose(0, 1))  # sequence first
        return self.head(self.encoder(x)).transpose(0, 1)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=text_file, default=str(ROOT / "README.md"), help="text to train on")
    parser.add_argument("--steps", type=positive, default=200, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, help="a file for a plot of the loss (needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Encoder()
    print(llmkern.kernelize(model))

    tokens, losses = as_bytes(options.text), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with tqdm(range(options.steps), "training") as bar:
        for _ in bar:
            batch = batch_of(tokens, rows=16)
            hidden = torch.rand(batch.shape) < 0.15
            logits = model(batch.masked_fill(hidden, HIDDEN))
            loss = F.cross_entropy(logits[hidden], batch[hidden])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    if options.plot is not None:
        plot(losses, options.plot)
    return losses


def plot(losses: list[float], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.plot(losses)
    axes.set(xlabel="step", ylabel="loss of the hidden bytes", title="A kernelized encoder in training")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
